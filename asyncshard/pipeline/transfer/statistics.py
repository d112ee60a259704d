"""What a load has done so far, and how far it has to go."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from asyncshard.events import (
    Closed,
    Delivered,
    Event,
    Opened,
    ReadEnded,
    ReadStarted,
    Retried,
    Unverified,
    Verified,
)


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


class Counters:
    """Statistics counted from the events of one load, which may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._opened: Opened | None = None
        self._tensors_done = self._bytes_done = self._bytes_in_flight = self._retries = 0
        self._is_verified: dict[str, bool] = {}
        """Whether an object matches its checksum, by its path, in the order in which the objects were opened."""

    def take(self, event: Event) -> None:
        """Count an event: the listener of a load's store and pipeline."""
        with self._lock:
            match event:
                case ReadStarted():
                    self._bytes_in_flight += event.stop - event.start
                case ReadEnded():
                    self._bytes_in_flight -= event.stop - event.start
                case Delivered():
                    self._tensors_done += event.tensors
                    self._bytes_done += event.nbytes
                case Retried():
                    self._retries += 1
                case Verified() | Unverified():
                    self._is_verified[event.path] = isinstance(event, Verified)
                case Opened():
                    self._opened = event
                case Closed():
                    self._ended = time.perf_counter()

    def statistics(self, *, bytes_held: int, budget_wait_s: float) -> Statistics:
        """Return a snapshot of what was counted, with what the memory account knows."""
        with self._lock:
            elapsed_s = (time.perf_counter() if self._ended is None else self._ended) - self._began
            opened = self._opened or _NOT_OPEN
            return Statistics(
                bytes_total=opened.bytes_total,
                bytes_done=self._bytes_done,
                tensors_total=opened.tensors_total,
                tensors_done=self._tensors_done,
                bytes_in_flight=self._bytes_in_flight,
                bytes_held=bytes_held,
                budget_wait_s=budget_wait_s,
                retries=self._retries,
                elapsed_s=elapsed_s,
                eta_s=None if self._opened is None else self._eta_s(opened, elapsed_s),
                missing=opened.missing,
                unexpected=opened.unexpected,
                verified=tuple(path for path, is_verified in self._is_verified.items() if is_verified),
                unverified=tuple(path for path, is_verified in self._is_verified.items() if not is_verified),
            )

    def _eta_s(self, opened: Opened, elapsed_s: float) -> float | None:
        if self._bytes_done == opened.bytes_total:
            return 0.0 if self._tensors_done == opened.tensors_total else None
        if self._bytes_done == 0:
            return None
        return elapsed_s * (opened.bytes_total - self._bytes_done) / self._bytes_done


_NOT_OPEN = Opened(0, 0, (), ())
NOT_STARTED = Statistics(0, 0, 0, 0, 0, 0, 0.0, 0, 0.0, None, (), (), (), ())
"""The statistics of a stream before it is opened."""
