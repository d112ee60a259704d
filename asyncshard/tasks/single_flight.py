"""One call for all tasks that ask for the same thing at the same time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from asyncshard.tasks.threads import wait_to_end

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Flight:
    """A call that has not ended yet."""

    task: asyncio.Task[Any]
    """The task that runs the call."""
    waiters: int = 0
    """The number of callers that wait for the task."""


class SingleFlight:
    """Shares one running call among all callers that use the same key.

    The call runs in a task of its own, so cancelling one waiter does not disturb the others. When its last waiter is
    cancelled, the call is cancelled too, and that waiter continues only after the call has ended. Results are not
    cached: after a call has returned or failed, the next caller with its key starts a new one.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return the result of `call`, or of the call that is already running under this key on this event loop."""
        loop = asyncio.get_running_loop()
        flight = self._flights.get((loop, key))
        if flight is None:
            flight = _Flight(loop.create_task(call(), name="asyncshard-flight"))
            self._flights[loop, key] = flight
            flight.task.add_done_callback(lambda task: self._forget((loop, key), task))
        flight.waiters += 1
        try:
            await asyncio.wait([flight.task])
        except asyncio.CancelledError:
            if flight.waiters == 1:
                self._forget((loop, key), flight.task)  # the next caller with this key starts a new call
                flight.task.cancel()
                with contextlib.suppress(BaseException):  # this task's own cancellation is what its caller hears of
                    await wait_to_end(flight.task)
            raise
        else:
            return cast(T, flight.task.result())
        finally:
            flight.waiters -= 1
            del flight  # a caller that stores the exception stores this frame too, but must not keep the call's buffers

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
