"""What can go wrong with a request, as values: decided where it is seen, acted on in one place."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from asyncshard.errors import ObjectChangedError, StoreError


class Action(Enum):
    """What helps against a failure."""

    GIVE_UP = auto()
    RETRY = auto()
    """After a pause."""
    RETRY_AT_ONCE = auto()
    """The server had closed an idle connection: nothing is wrong."""
    REFRESH_CREDENTIALS = auto()
    CORRECT_CLOCK = auto()
    CHANGE_REGION = auto()


REMEDIES = frozenset({Action.REFRESH_CREDENTIALS, Action.CORRECT_CLOCK, Action.CHANGE_REGION})
"""They change how requests are signed, and are not tried twice for one request."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt. It holds no URL and no header of the request, so no secret."""

    reason: str
    """What happened, in words, and what to check."""
    action: Action = Action.GIVE_UP
    kind: type[StoreError] = StoreError
    """The error that the user gets if nothing helps."""
    status: int | None = None
    """Of the HTTP answer."""
    request_id: str | None = None
    retry_after_s: float = 0.0
    """The pause that the server asks for."""
    region: str | None = None
    """Where the bucket is, with `CHANGE_REGION`."""
    server_time: float | None = None
    """Seconds since 1970 by the server's clock, with `CORRECT_CLOCK`."""

    @property
    def is_retryable(self) -> bool:
        """Whether a later call may succeed."""
        return self.action in (Action.RETRY, Action.RETRY_AT_ONCE) or issubclass(self.kind, ObjectChangedError)


class Failed(Exception):
    """Carries a `Failure` to where it is acted on; it never leaves the store."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure
