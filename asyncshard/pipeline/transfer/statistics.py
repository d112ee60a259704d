"""What a load has done so far, and how far it has to go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Statistics:
    """A snapshot of one stream; sizes in bytes, times in seconds."""

    bytes_total: int
    """Bytes of the tensors to be delivered."""
    bytes_done: int
    """Bytes of those delivered, or filled in their destination."""
    tensors_total: int
    tensors_done: int
    bytes_in_flight: int
    """Bytes being read now."""
    bytes_held: int
    """Bytes of delivered tensors that left the budget and are still alive."""
    budget_wait_s: float
    """Time that reads waited for the memory budget."""
    retries: int
    """Requests that were made again."""
    elapsed_s: float
    """Since the stream was opened, until it ended."""
    eta_s: float | None
    """Expected until the end, at the mean speed so far; None while nothing is known."""
    missing: tuple[str, ...]
    """Names that were asked for and that the checkpoint lacks."""
    unexpected: tuple[str, ...]
    """Names in the checkpoint that nobody asked for; they are not delivered."""
    verified: tuple[str, ...]
    """Objects whose bytes were compared with a checksum of the whole object, where that was asked for."""
    unverified: tuple[str, ...]
    """Those for which it was asked for, and that could not be compared, or not yet."""


@dataclass(slots=True)
class Counters:
    """What a pipeline counts while it runs."""

    bytes_total: int = 0
    bytes_done: int = 0
    tensors_total: int = 0
    tensors_done: int = 0
    bytes_in_flight: int = 0
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    def elapsed_s(self) -> float:
        return (time.perf_counter() if self.ended is None else self.ended) - self.began

    def eta_s(self) -> float | None:
        if self.bytes_done == self.bytes_total:
            return 0.0 if self.tensors_done == self.tensors_total else None
        if self.bytes_done == 0:
            return None
        return self.elapsed_s() * (self.bytes_total - self.bytes_done) / self.bytes_done
