"""When a failed request is made again: with full jitter, up to a number of attempts that progress resets.

Full jitter: a pause between 0 and a bound that doubles, so that clients that failed together do not come back together
(Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from asyncshard.stores.http.failures import REMEDIES, Action, Failure


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Limits for the attempts of one request."""

    max_attempts: int
    """The request fails after this many attempts in a row that bring no byte."""
    deadline_s: float
    """Seconds for all attempts of one request; they begin when the request gets its turn."""
    first_pause_s: float = 0.1
    """Seconds that the first pause takes at most; the bound doubles with each attempt."""
    longest_pause_s: float = 20.0
    """Seconds that any pause takes at most."""


class Retries:
    """Counts the attempts of one request, and decides whether another follows."""

    def __init__(self, policy: RetryPolicy, *, jitter: Callable[[], float] = random.random) -> None:
        self._policy = policy
        self._jitter = jitter
        self._failed_in_a_row = 0
        self._tried: set[Action] = set()

    def pause_after(self, failure: Failure, *, has_progressed: bool) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        `has_progressed` says whether the failed attempt brought bytes that stay.
        """
        if failure.action is Action.GIVE_UP or failure.action in self._tried:
            return None
        if failure.action in REMEDIES:
            self._tried.add(failure.action)
            return 0.0
        if failure.action is Action.RETRY_AT_ONCE:
            return 0.0
        self._failed_in_a_row = 1 if has_progressed else self._failed_in_a_row + 1
        if self._failed_in_a_row >= self._policy.max_attempts:
            return None
        bound = self._policy.first_pause_s * 2.0 ** min(self._failed_in_a_row - 1, 30)
        return max(self._jitter() * min(bound, self._policy.longest_pause_s), failure.retry_after_s)
