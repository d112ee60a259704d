"""Events of a load as values, with which listeners are called.

Stores and the pipeline make events, and statistics are counted from them. There is no event for each tensor: the
tensors that the consumer has taken are reported several at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Opened:
    """The checkpoint is open and its transfer is planned; no tensor has been read yet."""

    tensors_total: int
    """Tensors to be delivered."""
    bytes_total: int
    """Bytes of these tensors."""
    missing: tuple[str, ...]
    """Names that were asked for and that the checkpoint lacks."""
    unexpected: tuple[str, ...]
    """Names in the checkpoint that nobody asked for; they are not delivered."""


@dataclass(frozen=True, slots=True)
class ReadStarted:
    """The read of one byte range of an object begins. A `ReadEnded` of the same range follows, however it ends."""

    path: str
    """Full path or URL of the object."""
    start: int
    """First byte of the range."""
    stop: int
    """The byte behind its last one."""


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """The read of one byte range of an object has ended: with its bytes, with an error, or because it was stopped."""

    path: str
    """Full path or URL of the object."""
    start: int
    """First byte of the range."""
    stop: int
    """The byte behind its last one."""


@dataclass(frozen=True, slots=True)
class Retried:
    """A request failed and is made again, after a pause."""

    path: str
    """Full path or URL of the object, or of the listing."""
    reason: str
    """The cause of the failure in words; it holds no secret."""
    pause_s: float
    """Seconds until the next attempt."""
    attempt: int
    """The attempt that failed, counted from 1."""
    status: int | None
    """The HTTP status of the failed attempt; None where there was none."""
    request_id: str | None
    """Name of the failed request in the server's logs; None where the server did not say."""


@dataclass(frozen=True, slots=True)
class Verified:
    """An object was read whole, and its bytes match the checksum that its store keeps of it."""

    path: str
    """Full path or URL of the object."""


@dataclass(frozen=True, slots=True)
class Unverified:
    """An object is not compared with its checksum, or not yet: it was opened, or read again and did not match.

    It is reported of objects whose comparison was asked for. A `Verified` of the same object follows once it matches.
    """

    path: str
    """Full path or URL of the object."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """The consumer has taken tensors, or they have been filled in their destination."""

    tensors: int
    """Number of tensors since the last such event."""
    nbytes: int
    """Bytes of these tensors."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The reads of the load have stopped, all done or not, and its files are closed.

    The consumer may still take the tensors that were read last: their `Delivered` follows.
    """


Event = Opened | ReadStarted | ReadEnded | Retried | Verified | Unverified | Delivered | Closed
"""Any of these events."""
Listener = Callable[[Event], None]
"""Takes one event. It is called in the thread in which the event happens, so it must be quick, may be called from
several threads at once, and must not raise."""
