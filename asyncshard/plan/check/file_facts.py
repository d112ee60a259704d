"""What is kept of a file's header after it was checked: a few bytes for each tensor, so that thousands fit in memory.

Names are compared by Python's own hash of 64 bits, whose key differs from process to process: nobody can make two names
meet. The names themselves, for messages, are kept compressed, to about a twentieth.
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
"""How many names are kept of those that disagree with the index, or are tied, in one file."""
_BLOCK = 256  # names at once: the GIL is held for some tens of microseconds


@dataclass(frozen=True, slots=True, eq=False)
class PackedNames:
    """The names of one file's tensors, in file order."""

    hashes: Int64Array
    _lengths: NDArray[np.uint32]
    _text: bytes

    def at(self, rows: Iterable[int]) -> list[str]:
        """Return the names at some rows. Slow: it unpacks all."""
        text = zlib.decompress(self._text).decode("utf-8", "surrogatepass")
        stops = np.cumsum(self._lengths, dtype=np.int64)
        return [text[int(stops[row]) - int(self._lengths[row]) : int(stops[row])] for row in rows]


@dataclass(frozen=True, slots=True, eq=False)
class FileFacts:
    """One file whose header is valid."""

    name: str
    names: PackedNames
    dtype_codes: NDArray[np.uint8]
    """Of each tensor: its place in `DTYPES`."""
    dtype_bytes: Int64Array
    """Bytes of the tensors of each of the `DTYPES`."""
    nbytes: int
    """Bytes of all tensors."""
    ties: tuple[tuple[str, str], ...] = ()
    """Ties that the metadata tells, at most `MOST`: each the missing name, and that of a tensor of the file."""
    embeddings: tuple[str, ...] = ()
    """Names that end like `EMBEDDING` or `OUTPUT`."""
    absent: tuple[str, ...] = ()
    """Names that the index places in the file and that it lacks, at most `MOST`."""
    unexpected: tuple[str, ...] = ()
    """Those that it has and the index does not place there, at most `MOST`."""
    save: SaveId | None = None
    """The save that wrote the file, where its metadata tells."""
    step: str | None = None
    """What its metadata says under `STEP_KEY`."""

    def __len__(self) -> int:
        return len(self.dtype_codes)


def facts_of(
    name: str, header: Header, names: Iterable[str], weight_map: WeightMap | None = None, number: int | None = None
) -> FileFacts:
    """Return what is kept of a header.

    Parameters
    ----------
    name : str
        The file's.
    names : iterable of str
        The header's names, in order; a wrapper of the header may let go of the GIL between them.
    weight_map : WeightMap, optional
        Of the index.
    number : int, optional
        The place of the file in its ``files``. A file that it does not name is not compared.
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
    """A tensor that two files hold."""

    name: str
    first: str
    """The file that comes first."""
    second: str


class Difference(NamedTuple):
    """How the tensors of some files differ from those of others: the first names of each kind, and how many."""

    lacks: tuple[list[str], int]
    adds: tuple[list[str], int]
    retyped: tuple[list[str], int]
    """In both, of another dtype."""


class Tensors:
    """The tensors of several files taken together, in order."""

    def __init__(self, files: Sequence[FileFacts]) -> None:
        self._files = tuple(files)
        self._offsets = np.cumsum([0, *map(len, files)])
        self._hashes = np.concatenate([np.empty(0, np.int64), *(file.names.hashes for file in files)])
        self._codes = np.concatenate([np.empty(0, np.uint8), *(file.dtype_codes for file in files)])

    def duplicates(self) -> tuple[list[Duplicate], int]:
        """Return the first tensors that two files hold, in the order of the files, and how many there are."""
        order = np.argsort(self._hashes, kind="stable")
        same = np.flatnonzero(self._hashes[order[1:]] == self._hashes[order[:-1]])
        pairs = sorted(
            (int(order[place + 1]), int(order[place])) for place in same[np.argsort(order[same + 1])][:LISTED]
        )
        names = self._names([second for second, _ in pairs])
        return [
            Duplicate(name, self._file_of(first).name, self._file_of(second).name)
            for name, (second, first) in zip(names, pairs, strict=True)
        ], len(same)

    def difference(self, other: Tensors) -> Difference:
        """Return how `other` differs from this."""
        order, others = np.argsort(self._hashes, kind="stable"), np.argsort(other._hashes, kind="stable")
        mine, theirs = self._hashes[order], other._hashes[others]
        if np.array_equal(mine, theirs):
            lacking, added = np.empty(0, np.int64), np.empty(0, np.int64)
            retyped = order[self._codes[order] != other._codes[others]]
        else:
            lacking, added = order[~_is_in(mine, theirs)], others[~_is_in(theirs, mine)]
            _, own, their = np.intersect1d(self._hashes, other._hashes, return_indices=True)
            retyped = own[self._codes[own] != other._codes[their]]
        return Difference(self._first(lacking), other._first(added), self._first(retyped))

    def _first(self, rows: Int64Array) -> tuple[list[str], int]:
        return self._names(np.sort(rows)[:LISTED].tolist()), len(rows)

    def _file_of(self, row: int) -> FileFacts:
        return self._files[int(np.searchsorted(self._offsets, row, "right")) - 1]

    def _names(self, rows: Sequence[int]) -> list[str]:
        """Return the names at rows that are in order."""
        by_file: dict[int, list[int]] = {}
        for row in rows:
            number = int(np.searchsorted(self._offsets, row, "right")) - 1
            by_file.setdefault(number, []).append(row - int(self._offsets[number]))
        return [name for number, own in by_file.items() for name in self._files[number].names.at(own)]


def _is_in(values: Int64Array, others: Int64Array) -> NDArray[np.bool_]:
    """Return which of the values are among the others; both are sorted."""
    if not len(others):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(others, values), len(others) - 1)
    found: NDArray[np.bool_] = others[places] == values
    return found
