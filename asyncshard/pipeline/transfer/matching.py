"""Match a checkpoint's tensors with the caller's destinations.

Every error that can be found before a byte is written is raised here: names, shapes, dtypes, memory that cannot be
written, and memory that two destinations share.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard.arrays.base import ArrayLibrary, RawArray
from asyncshard.arrays.memory import is_sink, span
from asyncshard.errors import DestinationError, NamesError
from asyncshard.format.dtypes import DTYPES, Dtype
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.transfer.destinations import (
    MatchedDestinations,
    SecondCopy,
    ShardDestinations,
    StridedTarget,
)
from asyncshard.pipeline.transfer.shared_memory import CopyDigests, CoveredMemory, difference
from asyncshard.plan.items import TensorKey
from asyncshard.plan.text import enumerate_names
from asyncshard.tasks.yielding import yielding_gil

logger = logging.getLogger("asyncshard")


def match_destinations(
    checkpoint: Checkpoint,
    mapping: Mapping[str, Any],
    library: ArrayLibrary,
    *,
    strict: bool,
    cast: bool,
    path: str,
) -> MatchedDestinations:
    """Find the destination of every wanted tensor. This is slow for many tensors: call it off the event loop.

    Names that do not match are logged if they are not an error.

    Raises
    ------
    NamesError
        With `strict`: names are missing or unexpected. A destination without a tensor is not missing if the memory of
        another destination, which is filled, covers it (tied weights), or if it has no elements.
    DestinationError
        A shape, dtype or layout does not fit, or two destinations share memory. Two destinations may be the same memory
        if their tensors have the same dtype and shape: the second tensor is compared with the first when it is read.
    """
    matching = _Matching(checkpoint, mapping, library, cast=cast)
    for shard in checkpoint.shards:
        row = shard.header.table.row
        matching.matched.shards.append(ShardDestinations.empty())
        for index in yielding_gil(range(len(shard.header))):
            name, code, shape, start, stop = row(index)
            matching.add(name, DTYPES[code], shape, stop - start)
    matching.finish()
    matched = matching.matched
    if strict and (matched.missing or matched.unexpected):
        raise _names_error(path, matched, matching.problems)
    if matching.problems:
        listed = enumerate_names(matching.problems, separator="; ")
        raise DestinationError(f"{path}: {listed}. Nothing was written.", path=path)
    _warn(path, matched)
    return matched


def _warn(path: str, matched: MatchedDestinations) -> None:
    for names, what in (
        (matched.missing, "are missing from the checkpoint and keep their values"),
        (matched.unexpected, "are in the checkpoint and were not asked for"),
        (matched.narrowed, "are smaller than their destinations and fill their first corner"),
    ):
        if names:
            logger.warning("%s: %d tensors %s: %s", path, len(names), what, enumerate_names(names))


class _Matching:
    """The state of matching: what has been found for the tensors so far."""

    def __init__(
        self, checkpoint: Checkpoint, mapping: Mapping[str, Any], library: ArrayLibrary, *, cast: bool
    ) -> None:
        self._checkpoint = checkpoint
        self._mapping = mapping
        self._library = library
        self._cast = cast
        self._covered = CoveredMemory()
        self._unfit = CoveredMemory()
        """The memory of destinations that do not fit. A destination within it is not reported as missing, too."""
        self._found: set[str] = set()
        self._unexpected: list[str] = []
        self._narrowed: list[str] = []
        self.problems: list[str] = []
        """A sentence for each tensor that does not fit its destination."""
        self.matched = MatchedDestinations()

    def add(self, name: str, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> None:
        """Find the destination of the next tensor. If it does not fit, add a sentence to `problems`."""
        destinations = self.matched.shards[-1]
        if name not in self._mapping:
            self._unexpected.append(name)
            destinations.add(None)
            return
        self._found.add(name)
        try:
            self._fit(destinations, name, dtype, self._library.shape_of(dtype, shape, nbytes), self._mapping[name])
        except DestinationError as error:
            self.problems.append(str(error))
            self._note_unfit(name)
            destinations.add(None)

    def _note_unfit(self, name: str) -> None:
        with contextlib.suppress(DestinationError):
            memory = self._library.memory_of(name, self._mapping[name]).array
            if memory.size:
                self._unfit.add((0, 0), *span(memory), memory)

    def _fit(
        self, destinations: ShardDestinations, name: str, dtype: Dtype, shape: tuple[int, ...], target: Any
    ) -> None:
        if is_sink(target):
            destinations.add(target, indirect=target)
            return
        memory, strided, is_narrowed = fit(self._library, name, dtype, shape, target, cast=self._cast)
        if is_narrowed:
            self._narrowed.append(name)
        low, high = span(memory)
        if memory.size:
            self._covered.add((len(self.matched.shards) - 1, len(destinations.targets)), low, high, memory)
        destinations.add(target, low if strided is None else 0, strided)

    def finish(self) -> None:
        """Check the destinations together: shared memory, and missing names. Slow: call it off the event loop."""
        self._covered.sort()
        self._unfit.sort()
        self._find_second_copies()
        missing = [name for name in self._mapping if name not in self._found]
        self.matched.missing = tuple(name for name in missing if not self._is_filled_anyway(name))
        self.matched.unexpected = tuple(self._unexpected)
        self.matched.narrowed = tuple(self._narrowed)

    def _find_second_copies(self) -> None:
        """Compare tensors that share one destination, or mark the second to be compared when it is read.

        Other memory that two destinations share is a problem.
        """
        digests = CopyDigests(self._checkpoint)
        for first, second, is_exact in self._covered.overlaps(self._are_alike):
            names = self._name(first), self._name(second)
            are_equal = digests.are_equal(first, second) if is_exact else None
            if not is_exact:
                one, other = sorted(names)
                self.problems.append(f"the destinations of {one!r} and {other!r} share memory")
            elif are_equal is None:
                self.matched.shards[second[0]].compare_with_first(second[1], self._second_copy(first, second))
            elif are_equal:
                self.matched.shards[second[0]].drop(second[1])
            else:
                self.problems.append(difference(*names))

    def _second_copy(self, first: TensorKey, second: TensorKey) -> SecondCopy:
        name, code, shape, start, stop = self._checkpoint.shards[second[0]].header.table.row(second[1])
        dtype = DTYPES[code]
        shape = self._library.shape_of(dtype, shape, stop - start)
        memory, strided, _ = fit(self._library, name, dtype, shape, self._mapping[name], cast=self._cast)
        return SecondCopy(first, self._name(first), strided or memory.reshape(-1).view(np.uint8))

    def _are_alike(self, one: TensorKey, other: TensorKey) -> bool:
        """Return whether two tensors have the same dtype and shape."""
        facts = [self._checkpoint.shards[shard].header.table.row(index)[1:3] for shard, index in (one, other)]
        return facts[0] == facts[1]

    def _name(self, key: TensorKey) -> str:
        return self._checkpoint.shards[key[0]].header.table.name(key[1])

    def _is_filled_anyway(self, name: str) -> bool:
        """Return whether a destination without a tensor lies within another one, or has no elements."""
        target = self._mapping[name]
        if is_sink(target):
            return False
        try:
            memory = self._library.memory_of(name, target).array
        except DestinationError:
            return False
        return memory.size == 0 or any(each.has_inside(*span(memory)) for each in (self._covered, self._unfit))


class Fit(NamedTuple):
    """How a tensor fits its destination."""

    memory: NDArray[Any]
    """The elements that the tensor fills, as unsigned integers. This array keeps the memory alive."""
    strided: StridedTarget | None
    """How the elements are copied into the destination; None if it takes the file's bytes as they are."""
    is_narrowed: bool
    """Whether the destination is larger than the tensor."""


def fit(library: ArrayLibrary, name: str, dtype: Dtype, shape: tuple[int, ...], target: Any, *, cast: bool) -> Fit:
    """Return how a tensor fits the array `target`, which is its destination.

    `dtype` is the tensor's dtype in the file, and `shape` its shape in the array library.

    Raises
    ------
    DestinationError
        The tensor does not fit.
    """
    raw = library.memory_of(name, target)
    memory: NDArray[Any] = raw.array
    is_narrowed = memory.shape != shape
    if is_narrowed:
        memory = _narrow(name, memory, shape)
    is_cast = _is_cast(name, dtype, raw, cast)
    if not memory.flags.c_contiguous:
        _require_no_self_overlap(name, memory)
    if is_cast:
        assert raw.dtype is not None
        assert raw.dtype.numpy is not None
        assert dtype.numpy is not None
        return Fit(memory, StridedTarget(memory.view(raw.dtype.numpy), dtype.numpy), is_narrowed)
    return Fit(memory, None if memory.flags.c_contiguous else StridedTarget(memory, memory.dtype), is_narrowed)


def _narrow(name: str, memory: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    if len(shape) != memory.ndim or any(ours > theirs for ours, theirs in zip(shape, memory.shape, strict=True)):
        raise DestinationError(
            f"tensor {name!r} has shape {list(shape)}, its destination {list(memory.shape)}", tensor=name
        )
    return memory[tuple(slice(0, size) for size in shape)]


def _is_cast(name: str, ours: Dtype, raw: RawArray, may_cast: bool) -> bool:
    """Return whether elements have to be converted; raise DestinationError if they must not or cannot be."""
    theirs = raw.dtype
    if theirs is not None and (ours is theirs or (ours.numpy is None and theirs.name == "U8")):
        return False
    known = "a dtype the format does not have" if theirs is None else theirs.name
    if not may_cast:
        raise DestinationError(
            f"tensor {name!r} has dtype {ours.name}, its destination {known}; pass cast=True to convert", tensor=name
        )
    if (
        theirs is None
        or ours.numpy is None
        or theirs.numpy is None
        or ours.name == "C64"
        or not np.can_cast(ours.numpy, theirs.numpy, "unsafe")  # from F8_E8M0 to another dtype of 8 bits, say
    ):
        raise DestinationError(f"tensor {name!r} of dtype {ours.name} cannot be converted to {known}", tensor=name)
    return True


def _require_no_self_overlap(name: str, memory: NDArray[Any]) -> None:
    """Raise DestinationError for a view whose elements may share memory, such as a view with a stride of 0."""
    # If each stride is at least as large as all that the smaller strides span, no two elements overlap.
    reach = memory.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(memory.strides, memory.shape, strict=True)):
        if size > 1 and memory.size:
            if stride < reach:
                raise DestinationError(
                    f"the destination of {name!r} is a view whose elements share memory (strides {memory.strides})",
                    tensor=name,
                )
            reach += stride * (size - 1)


def _names_error(path: str, matched: MatchedDestinations, problems: list[str]) -> NamesError:
    parts = []
    if matched.missing:
        parts.append(f"missing from the checkpoint: {enumerate_names(matched.missing, is_quoted=True)}")
    if matched.unexpected:
        listed = enumerate_names(matched.unexpected, is_quoted=True)
        parts.append(f"in the checkpoint but not in the state dict: {listed}")
    if problems:
        parts.append(enumerate_names(problems, separator="; "))
    return NamesError(
        f"{path}: the names do not match: {'; '.join(parts)}. Nothing was written; strict=False loads what matches.",
        path=path,
        missing=matched.missing,
        unexpected=matched.unexpected,
    )
