"""Compact facts about the files of a checkpoint: a few bytes for each tensor, so that thousands of files fit in memory.

Names are compared by Python's hash of 64 bits. Its key differs from process to process, so nobody can construct names
with equal hashes. The names themselves are stored compressed, to about a twentieth, and are only used in messages.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import WeightMap
from asyncshard._typing import Int64Array
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import Header
from asyncshard.format.save_id import STEP_KEY, SaveId, save_id_of
from asyncshard.plan.text import LISTED
from asyncshard.plan.ties import EMBEDDING, OUTPUT, told_ties

MOST = 4096
"""For one file, at most 4,096 names are stored that disagree with the index, and at most 4,096 ties."""
_BLOCK = 256
"""256 names are packed at a time: the GIL is held for some tens of microseconds."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedNames:
    """The names of one file's tensors, in file order."""

    hashes: Int64Array
    """The hash of each name."""
    _lengths: NDArray[np.uint32]
    """The number of characters of each name."""
    _text: bytes
    """All names, one after the other, compressed."""

    def at(self, rows: Iterable[int]) -> list[str]:
        """Return the names at the given rows. This is slow, because it unpacks all names."""
        text = zlib.decompress(self._text).decode("utf-8", "surrogatepass")
        stops = np.cumsum(self._lengths, dtype=np.int64)
        return [text[int(stops[row]) - int(self._lengths[row]) : int(stops[row])] for row in rows]


@dataclass(frozen=True, slots=True, eq=False)
class FileFacts:
    """Facts about one file whose header is valid."""

    name: str
    """The name of the file."""
    names: PackedNames
    """The names of the tensors."""
    dtype_codes: NDArray[np.uint8]
    """The index in `DTYPES` of each tensor's element type."""
    dtype_bytes: Int64Array
    """For each of the `DTYPES`, the number of bytes of its tensors."""
    nbytes: int
    """The number of bytes of all tensors."""
    ties: tuple[tuple[str, str], ...] = ()
    """At most `MOST` ties that the metadata tells: the missing name, and the stored name in the file."""
    embeddings: tuple[str, ...] = ()
    """The names that end with `EMBEDDING` or `OUTPUT`."""
    absent: tuple[str, ...] = ()
    """At most `MOST` names that the index maps to the file, although the file lacks them."""
    unexpected: tuple[str, ...] = ()
    """At most `MOST` names in the file that the index does not map to it."""
    save: SaveId | None = None
    """The save that wrote the file; None if the metadata names none."""
    step: str | None = None
    """The value of `STEP_KEY` in the metadata, or None."""

    def __len__(self) -> int:
        return len(self.dtype_codes)


def facts_of(
    name: str, header: Header, names: Iterable[str], weight_map: WeightMap | None = None, number: int | None = None
) -> FileFacts:
    """Return the facts about a file, given its header.

    Parameters
    ----------
    name : str
        The name of the file.
    names : iterable of str
        The names in the header, in order; an iterator may release the GIL between them.
    weight_map : WeightMap, optional
        The map of the index, with which the header is compared.
    number : int, optional
        The index of the file in ``weight_map.files``; None for a file that is not compared.
    """
    packed, embeddings = _pack(iter(names), len(header))
    absent: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    if weight_map is not None and number is not None:
        absent, unexpected = weight_map.compare(number, header.table, limit=MOST)
    asked = frozenset(absent)
    ties = dict(islice(told_ties(header.metadata, header.__contains__, asked.__contains__), MOST))
    codes = np.array(header.table.dtype_codes)  # a copy: the header is let go of
    sizes = header.table.stops - header.table.starts
    return FileFacts(
        name,
        packed,
        codes,
        np.array([sizes[codes == code].sum() for code in range(len(DTYPES))], np.int64),
        int(sizes.sum()),
        tuple(ties.items()),
        embeddings,
        tuple(text for text in absent if text not in ties),
        tuple(unexpected),
        save_id_of(header.metadata),
        header.metadata.get(STEP_KEY),
    )


def _pack(names: Iterator[str], count: int) -> tuple[PackedNames, tuple[str, ...]]:
    hashes = np.empty(count, np.int64)
    lengths = np.empty(count, np.uint32)
    embeddings: list[str] = []
    packer = zlib.compressobj(1)
    pieces = []
    start = 0
    while block := list(islice(names, _BLOCK)):
        stop = start + len(block)
        hashes[start:stop] = [hash(name) for name in block]
        lengths[start:stop] = [len(name) for name in block]
        embeddings += [name for name in block if name.endswith((EMBEDDING, OUTPUT))]
        pieces.append(packer.compress("".join(block).encode("utf-8", "surrogatepass")))
        start = stop
    pieces.append(packer.flush())
    return PackedNames(hashes, lengths, b"".join(pieces)), tuple(embeddings[:MOST])


class Duplicate(NamedTuple):
    """A tensor name that two files hold."""

    name: str
    first: str
    """The name of the file that comes first in the order of the files."""
    second: str
    """The name of the other file."""


class Difference(NamedTuple):
    """How the tensors of one rank differ from those of another: the first names of each kind, and their number."""

    lacks: tuple[list[str], int]
    """Names that only the first rank has."""
    adds: tuple[list[str], int]
    """Names that only the second rank has."""
    retyped: tuple[list[str], int]
    """Names that both ranks have, with different dtypes."""


class Tensors:
    """The tensors of several files as one sequence, in the order of the files."""

    def __init__(self, files: Sequence[FileFacts]) -> None:
        self._files = tuple(files)
        self._offsets = np.cumsum([0, *map(len, files)])
        self._hashes = np.concatenate([np.empty(0, np.int64), *(file.names.hashes for file in files)])
        self._codes = np.concatenate([np.empty(0, np.uint8), *(file.dtype_codes for file in files)])

    def duplicates(self) -> tuple[list[Duplicate], int]:
        """Return the first tensors that two files hold, in the order of the files, and the number of all of them."""
        order = np.argsort(self._hashes, kind="stable")
        same = np.flatnonzero(self._hashes[order[1:]] == self._hashes[order[:-1]])
        pairs = sorted(
            (int(order[index + 1]), int(order[index])) for index in same[np.argsort(order[same + 1])][:LISTED]
        )
        names = self._names([second for second, _ in pairs])
        return [
            Duplicate(name, self._file_of(first).name, self._file_of(second).name)
            for name, (second, first) in zip(names, pairs, strict=True)
        ], len(same)

    def difference(self, other: Tensors) -> Difference:
        """Return how the tensors of `other` differ from these."""
        order, others = np.argsort(self._hashes, kind="stable"), np.argsort(other._hashes, kind="stable")
        mine, theirs = self._hashes[order], other._hashes[others]
        if np.array_equal(mine, theirs):
            lacking, added = np.empty(0, np.int64), np.empty(0, np.int64)
            retyped = order[self._codes[order] != other._codes[others]]
        else:
            lacking, added = order[~_is_in(mine, theirs)], others[~_is_in(theirs, mine)]
            _, our_rows, their_rows = np.intersect1d(self._hashes, other._hashes, return_indices=True)
            retyped = our_rows[self._codes[our_rows] != other._codes[their_rows]]
        return Difference(self._first(lacking), other._first(added), self._first(retyped))

    def _first(self, rows: Int64Array) -> tuple[list[str], int]:
        return self._names(np.sort(rows)[:LISTED].tolist()), len(rows)

    def _file_of(self, row: int) -> FileFacts:
        return self._files[int(np.searchsorted(self._offsets, row, "right")) - 1]

    def _names(self, rows: Sequence[int]) -> list[str]:
        """Return the names at the given rows, which ascend."""
        by_file: dict[int, list[int]] = {}
        for row in rows:
            number = int(np.searchsorted(self._offsets, row, "right")) - 1
            by_file.setdefault(number, []).append(row - int(self._offsets[number]))
        return [name for number, in_file in by_file.items() for name in self._files[number].names.at(in_file)]


def _is_in(values: Int64Array, others: Int64Array) -> NDArray[np.bool_]:
    """Return for each value whether it is among the others; both arrays are sorted."""
    if not len(others):
        return np.zeros(len(values), np.bool_)
    nearest = np.minimum(np.searchsorted(others, values), len(others) - 1)
    found: NDArray[np.bool_] = others[nearest] == values
    return found
