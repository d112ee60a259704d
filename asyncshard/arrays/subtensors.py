"""Leave out the tensors whose memory another tensor holds already, as before a state dict is written.

A tensor is dropped when another one of the same storage is contiguous and reaches from its first byte to its last, or
further. Of two contiguous tensors over the very same bytes the one with the smaller name stays; a contiguous one beats
one that is not. Tensors that overlap in part stay both.

Only a contiguous tensor (C order) covers: from any other, the bytes between its elements could not be restored. So two
views that span the same bytes with gaps, or transposed, stay both, though they may be equal; nothing is lost by that.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import numpy as np

from asyncshard import _core
from asyncshard.arrays.memory import MemoryBounds, memory_bounds

T = TypeVar("T")


class SubtensorFilter:
    """Drops tensors that share all their memory with another tensor."""

    @staticmethod
    def filter_subtensors(tensors: Mapping[str, T]) -> dict[str, T]:
        """Keep one tensor for each piece of memory, and drop the empty ones.

        What stays is what vLLM's sharded state keeps. Takes O(n log n) time.

        Parameters
        ----------
        tensors : mapping of str to numpy array or torch tensor
            NumPy arrays are compared by address, torch tensors within one storage of one device. Those that have no
            memory to share (meta, sparse) stay.

        Returns
        -------
        dict
            The same objects, in the order of the input.

        Raises
        ------
        TypeError
            A value is neither, and which.
        """
        dropped = set()
        spanned = _Columns()
        for name, tensor in tensors.items():
            try:
                bounds = memory_bounds(tensor)
            except TypeError as error:
                raise TypeError(f"tensor {name!r} is {error}") from None
            if _is_empty(tensor):
                dropped.add(name)
            elif bounds is not None:
                spanned.append(name, bounds)
        dropped.update(spanned.covered_names())
        return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def _is_empty(tensor: Any) -> bool:
    return bool((tensor.size if isinstance(tensor, np.ndarray) else tensor.numel()) == 0)


class _Columns:
    """Bounds of many tensors in lists of numbers: 100,000 kept tuples would set off the garbage collector."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._spaces: dict[Hashable, int] = {}
        self._groups: list[int] = []
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._contiguous: list[bool] = []

    def append(self, name: str, bounds: MemoryBounds) -> None:
        space, start, stop, is_contiguous = bounds
        self._names.append(name)
        self._groups.append(self._spaces.setdefault(space, len(self._spaces)))
        self._starts.append(start)
        self._stops.append(stop)
        self._contiguous.append(is_contiguous)

    def covered_names(self) -> list[str]:
        names = self._names
        name_ranks = np.empty(len(names), np.int64)
        name_ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
        keep = np.empty(len(names), np.uint8)
        _core.find_uncovered(
            np.array(self._starts, np.uint64),
            np.array(self._stops, np.uint64),
            np.array(self._contiguous, np.uint8),
            np.array(self._groups, np.int64),
            name_ranks,
            keep,
        )
        return [name for name, is_kept in zip(names, keep.tolist(), strict=True) if not is_kept]
