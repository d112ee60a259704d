"""What a way of loading is, and what it loads into."""

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
"""What is timed; it may return figures of its own. May run several times."""


@dataclass(slots=True)
class Case:
    """What one process loads, and into what."""

    data: Dataset
    budget_mb: int | None = None
    endpoint: Endpoint | None = None
    """The server, of what is loaded from S3."""
    open: Callable[[AsyncExitStack], Awaitable[None]] | None = None
    """What is done on the loop before the clock starts; what it enters is left after it has stopped."""
    nbytes: int = 0
    """Bytes that one run moves; 0 where that says nothing."""
    verify: Callable[[], None] | None = None
    """Raises AssertionError where what was loaded is wrong, after the clock has stopped."""
    kept: list[Any] = field(default_factory=list)
    """What must not die before the clock has stopped."""
    _state: dict[str, Any] = field(default_factory=dict)
    _placed: list[Placed] = field(default_factory=list)

    def destinations(self, library: str = "torch", path: Path | None = None) -> dict[str, Any]:
        """Return a state dict for the rank, or for one part of it, every page touched; `check` looks at it."""
        self._placed = list(self.data.tensors(path))
        self.nbytes = sum(placed.tensor.nbytes for placed in self._placed)
        for placed in self._placed:
            self._state[placed.tensor.name] = _LIBRARIES[library](placed.tensor.shape)
        return self._state

    @property
    def placed(self) -> list[Placed]:
        """What is loaded into the destinations, and where it lies."""
        return self._placed

    def check(self) -> None:
        """Compare both ends of each destination with the files."""
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
    """One way of doing something that is worth timing."""

    prepare: Callable[[Case], Run]
    """Does all that comes before the clock starts."""
    needs: tuple[str, ...] = ()
    """Modules beyond those that the library requires."""


def _torch_zeros(shape: tuple[int, ...]) -> Any:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16).fill_(0)


def _numpy_zeros(shape: tuple[int, ...]) -> Any:
    import ml_dtypes

    return np.full(shape, 0, ml_dtypes.bfloat16)


_LIBRARIES: dict[str, Callable[[tuple[int, ...]], Any]] = {"torch": _torch_zeros, "numpy": _numpy_zeros}


def touch_memory(folder: Path, nbytes: int) -> None:
    """Have the kernel use as much memory for a file, and free it again, before so many bytes are written for the clock.

    A virtual machine gets memory from its host when it first touches it, and gives it back seconds after it was freed.
    That takes several times as long as a copy, and whoever writes after somebody else would be spared of it.
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
