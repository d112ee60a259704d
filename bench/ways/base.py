"""A way of loading, and the case for which it runs: the files, the destinations, and a check of the result."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.checkpoint import Dataset, Placed
from bench.endpoint import Endpoint

Run = Callable[[], Awaitable[Mapping[str, float] | None] | Mapping[str, float] | None]
"""The function that is timed. It may return further figures, and may be called several times."""


@dataclass(slots=True)
class Case:
    """The files that one process loads, and the destinations that it fills."""

    data: Dataset
    budget_mb: int | None = None
    endpoint: Endpoint | None = None
    """The S3 server; None for a way that loads from the disk."""
    open: Callable[[AsyncExitStack], Awaitable[None]] | None = None
    """Called on the event loop before the clock starts. Contexts that it enters are left after the clock stops."""
    nbytes: int = 0
    """The number of bytes that one run moves; 0 if a speed would mean nothing."""
    verify: Callable[[], None] | None = None
    """Called after the clock has stopped; it raises AssertionError if a loaded value is wrong."""
    kept: list[Any] = field(default_factory=list)
    """Objects that must not die before the clock has stopped."""
    _state: dict[str, Any] = field(default_factory=dict)
    _placed: list[Placed] = field(default_factory=list)

    def destinations(self, library: str = "torch", path: Path | None = None) -> dict[str, Any]:
        """Return a state dict for the rank, or for one file of it, with all pages touched; `check` compares it."""
        self._placed = list(self.data.tensors(path))
        self.nbytes = sum(placed.tensor.nbytes for placed in self._placed)
        for placed in self._placed:
            self._state[placed.tensor.name] = _LIBRARIES[library](placed.tensor.shape)
        return self._state

    @property
    def placed(self) -> list[Placed]:
        """The tensors that are loaded into the destinations."""
        return self._placed

    def check(self) -> None:
        """Compare the first and the last bytes of each destination with the files."""
        if self.verify is not None:
            self.verify()
        for placed in self._placed:
            data = octets(self._state[placed.tensor.name])
            with placed.path.open("rb") as file:
                for begin in (0, max(len(data) - 64, 0)):
                    wanted = os.pread(file.fileno(), 64, placed.start + begin)[: len(data) - begin]
                    if data[begin : begin + 64].tobytes() != wanted:
                        raise AssertionError(f"{placed.tensor.name} was not loaded")


@dataclass(frozen=True, slots=True)
class Way:
    """One way of loading, or of doing another thing that is timed."""

    prepare: Callable[[Case], Run]
    """Function that does everything before the clock starts, and returns the function that is timed."""
    needs: tuple[str, ...] = ()
    """Modules that the way imports, beyond those that the library requires."""


def _torch_zeros(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16).fill_(0)


def _numpy_zeros(shape: tuple[int, ...]) -> Any:
    import ml_dtypes

    return np.full(shape, 0, ml_dtypes.bfloat16)


_LIBRARIES: dict[str, Callable[[tuple[int, ...]], Any]] = {"torch": _torch_zeros, "numpy": _numpy_zeros}


def touch_memory(folder: Path, nbytes: int) -> None:
    """Make the kernel use `nbytes` of page cache for a file and free them again, before the timed function writes.

    A virtual machine gets memory from its host when it first touches it, and gives it back seconds after it was freed.
    That takes several times as long as a copy. Without this, only the first of several cases would pay for it.
    """
    path = folder / "touched"
    piece = os.urandom(1 << 20)
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(-(-nbytes // len(piece))):
                file.write(piece)
    finally:
        path.unlink(missing_ok=True)


def octets(array: Any) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array.reshape(-1).view(np.uint8)
    import torch

    return array.detach().reshape(-1).view(torch.uint8).numpy()
