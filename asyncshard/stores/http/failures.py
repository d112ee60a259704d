"""Failures of requests as values: made where a failure is seen, acted on in one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from asyncshard.errors import ObjectChangedError, StoreError


class Action(Enum):
    """The remedy for a failure."""

    GIVE_UP = auto()
    RETRY = auto()
    """After a pause."""
    RETRY_AT_ONCE = auto()
    """Without a pause: the server had closed an idle connection, and nothing is wrong."""
    REFRESH_CREDENTIALS = auto()
    CORRECT_CLOCK = auto()
    CHANGE_REGION = auto()


REMEDIES = frozenset({Action.REFRESH_CREDENTIALS, Action.CORRECT_CLOCK, Action.CHANGE_REGION})
"""Actions that change how requests are signed. Each is tried once for one request."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt. It holds no URL and no header of the request, so no secret."""

    reason: str
    """The cause in words, and what to check."""
    action: Action = Action.GIVE_UP
    kind: type[StoreError] = StoreError
    """Class of the error that the user gets if nothing helps."""
    status: int | None = None
    """HTTP status of the response; None where there was no response."""
    request_id: str | None = None
    """How the server calls the request in its logs."""
    retry_after_s: float = 0.0
    """Seconds of pause that the server asks for."""
    region: str | None = None
    """With `CHANGE_REGION`: the region that the bucket is in."""
    server_time: float | None = None
    """With `CORRECT_CLOCK`: seconds since 1970 by the server's clock."""

    @property
    def is_retryable(self) -> bool:
        """Whether a later call may succeed."""
        return self.action in (Action.RETRY, Action.RETRY_AT_ONCE) or issubclass(self.kind, ObjectChangedError)


class Failed(Exception):
    """Carries a `Failure` to where it is acted on. It never leaves the store."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure
