"""Coroutines run a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any


async def run_all(count: int, jobs: Iterator[Coroutine[Any, Any, object]]) -> None:
    """Run coroutines, `count` at a time, begun in order; of several failures raise that of the first to be begun.

    After a failure those that run end, and no other is begun. They all have ended when this returns, raises or is
    cancelled.
    """
    numbered = enumerate(jobs)
    failures: list[tuple[int, Exception]] = []

    async def work() -> None:
        for number, job in numbered:
            try:
                await job
            except Exception as error:
                failures.append((number, error))
            if failures:
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(work())
    if failures:
        try:
            raise min(failures, key=lambda failure: failure[0])[1]
        finally:
            failures.clear()
