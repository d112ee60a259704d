"""Statistics of a load: how much has been read and delivered, and how much remains."""

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
    """A snapshot of one stream, with sizes in bytes and times in seconds."""

    bytes_total: int
    """The bytes of all tensors that the stream delivers."""
    bytes_done: int
    """The bytes of the tensors that were delivered."""
    tensors_total: int
    """The number of tensors that the stream delivers."""
    tensors_done: int
    """The number of tensors that were delivered."""
    bytes_in_flight: int
    """The bytes that are being read now."""
    bytes_held: int
    """The bytes of delivered tensors that have left the budget and are alive."""
    budget_wait_s: float
    """The time for which reads have waited for the memory budget."""
    retries: int
    """The number of requests that were repeated."""
    elapsed_s: float
    """The time since the stream was opened; after its end, the time that it took."""
    eta_s: float | None
    """The expected time until the end, at the mean speed so far; None if there is no speed yet."""
    missing: tuple[str, ...]
    """Names of destinations for which the checkpoint has no tensor."""
    unexpected: tuple[str, ...]
    """Names of tensors that have no destination. They are not delivered."""
    verified: tuple[str, ...]
    """Paths of the objects that were compared with their checksum, if the store was asked to verify them."""
    unverified: tuple[str, ...]
    """Paths of the objects that the store was asked to verify, and could not compare, or has not compared yet."""


class Counters:
    """Counts the events of one load, which may come from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._ended: float | None = None
        self._opened: Opened | None = None
        self._tensors_done = self._bytes_done = self._bytes_in_flight = self._retries = 0
        self._is_verified: dict[str, bool] = {}
        """For each object, by its path: whether it was verified. Objects are in the order in which they were opened."""

    def take(self, event: Event) -> None:
        """Count an event. This method is the listener of a load's store and pipeline."""
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
        """Return a snapshot of the counts. The two arguments are figures of the load's memory account."""
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
