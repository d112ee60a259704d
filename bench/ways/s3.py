"""The library's own ways of loading from S3."""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any

import numpy as np

from asyncshard import AsyncShardLoader, MemoryBudget, ShardedStateLoader
from asyncshard.arrays.frameworks import load_library
from asyncshard.stores import Store, from_url
from bench.checkpoint import RANK, WORLD_SIZE
from bench.endpoint import BUCKET
from bench.ways.base import Case, Run, Way

_RANK_URL = f"s3://{BUCKET}/rank"
_MIB = 1 << 20
_TIMES_SLOWER = 5
"""Loads that each make a client of their own are slower, so 5 times fewer of them are cancelled."""


def _options(case: Case) -> dict[str, Any]:
    assert case.endpoint is not None
    return case.endpoint.options()


def _base(case: Case, framework: str = "pt", **tuning: Any) -> ShardedStateLoader:
    """Return a loader whose framework has been imported."""
    loader = ShardedStateLoader(
        rank=RANK, world_size=WORLD_SIZE, framework=framework, memory_budget_mb=case.budget_mb, **tuning
    )
    load_library(loader.options.framework)
    return loader


def open_store(case: Case, url: str = _RANK_URL) -> Store:
    """Return a store that makes its client, and one request, before the clock starts."""
    store = from_url(url, **_options(case))

    async def begin(stack: AsyncExitStack) -> None:
        await stack.enter_async_context(store)
        await store.list()

    case.open = begin
    return store


def _load_weights(case: Case) -> Run:
    """Load into a state dict of torch tensors."""
    state = case.destinations()
    loader = _base(case)
    store = open_store(case)

    async def run() -> None:
        await loader.load_weights(store, state)

    return run


def _load_weights_from_url(case: Case) -> Run:
    """Load into a state dict from a URL: the clock includes importing botocore, making the client, and listing."""
    state = case.destinations()
    loader = _base(case, storage_options=_options(case))

    async def run() -> None:
        await loader.load_weights(_RANK_URL, state)

    return run


def _stream_count(case: Case) -> Run:
    """Stream, and drop each tensor at once."""
    case.nbytes = case.data.rank_bytes
    _base(case)
    store = open_store(case)

    async def run() -> Mapping[str, float]:
        count = 0
        async with AsyncShardLoader(_base(case)).stream(store) as weights:
            async for _ in weights:
                count += 1
        return {"tensors": count}

    return run


def _load_pages(case: Case) -> Run:
    """Load very many tensors of 4 KiB into arrays, from a URL."""
    path = case.data.pages
    state = case.destinations("numpy", path)
    loader = _base(case, "np", storage_options=_options(case))

    async def run() -> None:
        await loader.load_weights(f"s3://{BUCKET}/{path.name}", state)

    return run


def _stream_pages(case: Case) -> Run:
    """Stream very many tensors of 4 KiB, from a URL."""
    path = case.data.pages
    case.nbytes = path.stat().st_size
    base = _base(case, "np", storage_options=_options(case))

    async def run() -> Mapping[str, float]:
        count = 0
        async with AsyncShardLoader(base).stream(f"s3://{BUCKET}/{path.name}") as weights:
            async for _ in weights:
                count += 1
        return {"tensors": count}

    return run


def _load_late(case: Case) -> Run:
    """Load tensors of 1 MiB, one request each, from the slow server."""
    path = case.data.late
    state = case.destinations(path=path)
    loader = _base(case, chunk_size=_MIB)
    store = open_store(case, f"s3://{BUCKET}/{path.name}")

    async def run() -> None:
        await loader.load_weights(store, state)

    return run


def _cancel(case: Case) -> Run:
    """Cancel loads from one open store at random points."""
    loader, url, state = _for_cancel(case)
    store = open_store(case, url)
    begin, checked = case.open, _Left()

    async def begin_checked(stack: AsyncExitStack) -> None:
        checked.note()
        stack.push_async_callback(checked.none_is_left)
        assert begin is not None
        await begin(stack)

    case.open = begin_checked
    return _cancelling(case, loader, lambda: loader.load_weights(store, state))


def _cancel_from_url(case: Case) -> Run:
    """Cancel loads from a URL, which make and close a store each, at random points. Nothing may be left of them."""
    loader, url, state = _for_cancel(case, storage_options=_options(case))
    return _cancelling(case, loader, lambda: loader.load_weights(url, state), _Left())


def _for_cancel(case: Case, **tuning: Any) -> tuple[ShardedStateLoader, str, dict[str, Any]]:
    path = case.data.layers_only
    state = case.destinations(path=path)
    loader = _base(case, budget=MemoryBudget(64), **tuning)
    return loader, f"{_RANK_URL}/{path.name}", state


class _Left:
    """Finds what a load must not leave behind in its process: tasks, threads and sockets."""

    def note(self) -> None:
        """Note how many tasks, threads and sockets exist now."""
        self._before = self._now()

    async def none_is_left(self) -> None:
        """Raise AssertionError if there is more than `note` has seen."""
        now = self._now()
        more = {name: count for name, count in now.items() if count > self._before[name]}
        if more:
            raise AssertionError(f"more than before the load, {self._before}: {more}")

    @staticmethod
    def _now() -> dict[str, int]:
        return {
            "sockets": sum(link.startswith("socket:") for link in _open_files()),
            "tasks": len(asyncio.all_tasks()),
            "threads": threading.active_count(),
        }


def _open_files() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor that listed the folder is closed by now
            yield os.readlink(f"/proc/self/fd/{entry}")


def _cancelling(
    case: Case, loader: ShardedStateLoader, load: Callable[[], Awaitable[object]], left: _Left | None = None
) -> Run:
    async def run() -> Mapping[str, float]:
        await load()  # imports modules, and starts the threads that the loop keeps
        began = time.perf_counter()
        await load()
        whole_s = time.perf_counter() - began
        tasks = len(asyncio.all_tasks())
        if left is not None:
            left.note()
        points = random.Random(0)
        cancels = case.data.scale.cancels // (1 if left is None else _TIMES_SLOWER)
        late: list[float] = []
        completed = 0
        while len(late) < cancels:
            task = asyncio.ensure_future(load())
            await asyncio.sleep(points.uniform(0, whole_s))
            began = time.perf_counter()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if task.cancelled():
                late.append(time.perf_counter() - began)
            else:
                completed += 1
            if left is not None:
                await left.none_is_left()
            budget = loader.options.budget
            assert budget is not None
            if budget.bytes_used or len(asyncio.all_tasks()) > tasks:
                raise AssertionError(f"a cancelled load left {budget.bytes_used} bytes, or a task")
        await load()  # so that the destinations are complete at the end
        p50, p99 = np.percentile(late, (50, 99)) * 1e3
        return {
            "cancels": len(late),
            "completed": completed,
            "cancel_p50_ms": float(p50),
            "cancel_p99_ms": float(p99),
            "cancel_max_ms": max(late) * 1e3,
        }

    return run


_NEEDS = ("aiobotocore",)
_NEEDS_TORCH = ("torch", *_NEEDS)

S3 = {
    "s3-load-weights": Way(_load_weights, _NEEDS_TORCH),
    "s3-load-weights-from-url": Way(_load_weights_from_url, _NEEDS_TORCH),
    "s3-stream-count": Way(_stream_count, _NEEDS_TORCH),
    "s3-load-pages": Way(_load_pages, _NEEDS),
    "s3-stream-pages": Way(_stream_pages, _NEEDS),
    "s3-load-late": Way(_load_late, _NEEDS_TORCH),
    "s3-cancel": Way(_cancel, _NEEDS_TORCH),
    "s3-cancel-from-url": Way(_cancel_from_url, _NEEDS_TORCH),
}
