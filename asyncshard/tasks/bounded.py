"""Coroutines run a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, Literal, TypeVar

from asyncshard.tasks.threads import wait_to_end

T = TypeVar("T")


async def run_bounded(
    count: int, jobs: Iterable[Coroutine[Any, Any, T]], *, on_failure: Literal["finish", "cancel"]
) -> list[T]:
    """Run coroutines, at most `count` at a time, begun in their order, and return their results in that order.

    After a failure no further coroutine is taken from `jobs` or begun. When this function returns, raises or is
    cancelled, all coroutines that were begun have ended.

    Parameters
    ----------
    on_failure : {"finish", "cancel"}
        "finish" lets the other running coroutines end; if several fail, the error of the one begun first is raised.
        "cancel" cancels them, and raises the error that occurred first.
    """
    pending = iter(jobs)
    begun = 0
    results: dict[int, T] = {}
    failures: dict[int, BaseException] = {}
    workers: list[asyncio.Task[None]] = []

    def cancel() -> None:
        while workers:  # each worker once: a coroutine that is ending after its cancellation is not disturbed
            workers.pop().cancel()

    async def work() -> None:
        nonlocal begun
        while not failures:
            number = begun
            begun += 1
            try:
                job = next(pending, None)
                if job is None:
                    return
                results[number] = await job
            except (Exception, asyncio.CancelledError) as error:
                failures[number] = error
                if on_failure == "cancel":
                    cancel()

    try:
        for _ in range(count):
            workers.append(asyncio.create_task(work()))
        await wait_to_end(asyncio.gather(*workers, return_exceptions=True), cancel)
        if failures:
            raise failures[min(failures) if on_failure == "finish" else next(iter(failures))]
        return [results[number] for number in sorted(results)]
    finally:
        failures.clear()  # a reference cycle of exception and frame would keep the caller's buffers alive
