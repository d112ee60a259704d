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
    """A call on its way, and how many wait for it."""

    task: asyncio.Task[Any]
    waiters: int = 0


class SingleFlight:
    """Share calls by key. A call runs in a task of its own, so that no waiter's cancellation disturbs another.

    When its last waiter is cancelled, so is the call, and that waiter goes on once the call has ended. Nothing is
    remembered of a call that has ended, failed ones included.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    def __len__(self) -> int:
        return len(self._flights)

    async def run(self, key: Hashable, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what `call` returns, or what one returns that began earlier under the same key, in this event loop."""
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
                self._forget((loop, key), flight.task)  # who asks from now on begins a new call
                flight.task.cancel()
                with contextlib.suppress(BaseException):  # this task's own cancellation is what its caller hears of
                    await wait_to_end(flight.task)
            raise
        else:
            return cast(T, flight.task.result())
        finally:
            flight.waiters -= 1
            del flight  # whoever keeps the exception keeps this frame, and must not keep the call's buffers with it

    def _forget(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        flight = self._flights.get(key)
        if flight is not None and flight.task is task:
            del self._flights[key]
