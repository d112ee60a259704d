"""A filter that drops tensors whose memory another tensor holds already, for use before a state dict is written.

A tensor is dropped when another tensor of the same storage is contiguous and reaches from its first byte to its last,
or further. If two contiguous tensors span exactly the same bytes, the one with the smaller name is kept; a contiguous
tensor is preferred to one that is not. If two tensors overlap only in part, both are kept.

Only a contiguous tensor (C order) can cover another: any other one does not hold the bytes between its elements. So two
views that span the same bytes with gaps, or transposed, are both kept even if they are equal; no data is lost by that.
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
        """Return the tensors whose memory no other tensor covers, without the empty ones.

        These are the tensors that vLLM's sharded state keeps. Takes O(n log n) time.

        Parameters
        ----------
        tensors : mapping of str to numpy array or torch tensor
            NumPy arrays are compared by address, torch tensors within one storage of one device. Tensors without
            memory to share (meta, sparse) are kept.

        Returns
        -------
        dict
            The same objects, in the order of the input.

        Raises
        ------
        TypeError
            A value is neither a NumPy array nor a torch tensor; the message names it.
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
    """The bounds of many tensors as lists of numbers: 100,000 tuples would trigger the garbage collector."""

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
        """Return the names of the tensors that another tensor covers."""
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
