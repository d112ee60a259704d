"""The library's own ways of loading from the local disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from asyncshard import AsyncShardLoader, ShardedStateLoader, load, read_header
from asyncshard.arrays.frameworks import load_library
from bench.checkpoint import RANK, WORLD_SIZE
from bench.ways.base import Case, Run, Way


def _base(case: Case, framework: str = "pt") -> ShardedStateLoader:
    """Return a loader whose framework has been imported."""
    loader = ShardedStateLoader(rank=RANK, world_size=WORLD_SIZE, framework=framework, memory_budget_mb=case.budget_mb)
    load_library(loader.options.framework)
    return loader


def _load_weights(case: Case) -> Run:
    """Load into a state dict of torch tensors."""
    state = case.destinations()
    loader = _base(case)

    async def run() -> None:
        await loader.load_weights(case.data.rank, state)

    return run


def _load_weights_numpy(case: Case) -> Run:
    """Load into a state dict of NumPy arrays."""
    state = case.destinations("numpy")
    loader = _base(case, "np")

    async def run() -> None:
        await loader.load_weights(case.data.rank, state)

    return run


def _load_new(case: Case) -> Run:
    """Load as a dict of new tensors, whose pages are touched for the first time."""
    options = _base(case).options
    case.nbytes = case.data.rank_bytes

    async def run() -> None:
        case.kept[:] = [await load(case.data.rank, rank=RANK, world_size=WORLD_SIZE, framework=options.framework)]

    return run


def _stream_copy(case: Case) -> Run:
    """Stream, and `copy_` each tensor on the event loop, with a new budget, whose pages were never touched."""
    state = case.destinations()

    async def run() -> None:
        await _copy_all(AsyncShardLoader(_base(case)), case, state)

    return run


def _stream_copy_again(case: Case) -> Run:
    """Stream and `copy_` a second time with one loader, whose budget has touched its pages."""
    state = case.destinations()
    loader = AsyncShardLoader(_base(case))
    asyncio.run(_copy_all(loader, case, state))
    for destination in state.values():
        destination.fill_(0)

    async def run() -> None:
        await _copy_all(loader, case, state)

    return run


def _stream_copy_layers(case: Case) -> Run:
    """Stream and `copy_` the rank shard without large tensors, within a small budget."""
    state = case.destinations(path=case.data.layers_only)

    async def run() -> None:
        async with AsyncShardLoader(_base(case)).stream(case.data.layers_only) as weights:
            async for name, tensor in weights:
                state[name].copy_(tensor)

    return run


async def _copy_all(loader: AsyncShardLoader, case: Case, state: Mapping[str, Any]) -> None:
    async with loader.stream(case.data.rank) as weights:
        async for name, tensor in weights:
            state[name].copy_(tensor)


def _stream_count(case: Case) -> Run:
    """Stream, and drop each tensor at once."""
    case.nbytes = case.data.rank_bytes
    _base(case)

    async def run() -> Mapping[str, float]:
        count = 0
        async with AsyncShardLoader(_base(case)).stream(case.data.rank) as weights:
            async for _ in weights:
                count += 1
        return {"tensors": count}

    return run


def _stream_into(case: Case) -> Run:
    """Stream into destinations, and count them as they are filled."""
    state = case.destinations()

    async def run() -> Mapping[str, float]:
        count = 0
        async with AsyncShardLoader(_base(case)).stream(case.data.rank, into=state) as weights:
            async for _ in weights:
                count += 1
        return {"tensors": count}

    return run


def _open_header(case: Case) -> Run:
    """Open a file whose header has very many tensors."""

    async def run() -> None:
        await read_header(case.data.header(case.data.scale.headers[0]))

    return run


def _open_large_header(case: Case) -> Run:
    """Open the file with the largest header, and measure the memory for it, from the bytes of the file on."""
    path = case.data.header(case.data.scale.headers[1])

    async def run() -> Mapping[str, float]:
        header = await read_header(path)
        case.kept[:] = [header]
        return {"header_bytes": header.size, "held_bytes": header.nbytes}

    return run


def _stream_small(case: Case, framework: str) -> Run:
    """Stream very many tensors of 4 bytes. The time for each tensor counts from when the stream is open."""
    _base(case, framework)

    async def run() -> Mapping[str, float]:
        count = 0
        async with AsyncShardLoader(_base(case, framework)).stream(case.data.small) as weights:
            began = time.perf_counter()
            async for _ in weights:
                count += 1
            elapsed = time.perf_counter() - began
        return {"microseconds_per_tensor": elapsed / count * 1e6, "tensors": count}

    return run


ASYNCSHARD = {
    "load-weights": Way(_load_weights, ("torch",)),
    "load-weights-numpy": Way(_load_weights_numpy),
    "load-new": Way(_load_new, ("torch",)),
    "stream-copy": Way(_stream_copy, ("torch",)),
    "stream-copy-again": Way(_stream_copy_again, ("torch",)),
    "stream-copy-layers": Way(_stream_copy_layers, ("torch",)),
    "stream-count": Way(_stream_count, ("torch",)),
    "stream-into": Way(_stream_into, ("torch",)),
    "open-header": Way(_open_header),
    "open-large-header": Way(_open_large_header),
    "stream-small-numpy": Way(lambda case: _stream_small(case, "np")),
    "stream-small-torch": Way(lambda case: _stream_small(case, "pt"), ("torch",)),
}
