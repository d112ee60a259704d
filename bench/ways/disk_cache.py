"""Ways that load from S3 through the disk cache."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

from asyncshard import ShardedStateLoader
from asyncshard.arrays.frameworks import load_library
from bench.checkpoint import RANK, WORLD_SIZE
from bench.endpoint import BUCKET
from bench.ways.base import Case, Run, Way, touch_memory
from bench.ways.s3 import open_store

_RANK_URL = f"s3://{BUCKET}/rank"
_MIB = 1 << 20
_PROCESSES = 8
_PROCESS_BUDGET_MB = 256


def _loader(case: Case) -> ShardedStateLoader:
    """Return a loader with a disk cache, whose framework has been imported."""
    assert case.endpoint is not None
    loader = ShardedStateLoader(
        rank=RANK,
        world_size=WORLD_SIZE,
        framework="pt",
        cache_dir=_directory(case),
        storage_options=case.endpoint.options(),
    )
    load_library(loader.options.framework)
    return loader


def _directory(case: Case) -> Path:
    return case.data.folder / "cache"


@contextmanager
def _removed(directory: Path) -> Iterator[None]:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _first(case: Case) -> Run:
    """Load into a state dict while the disk cache is written."""
    return _after(case, _loader(case))


def _second(case: Case) -> Run:
    """Load cached objects into a state dict, in a new process: it verifies the blocks that it reads."""
    writer = _loader(case)
    return _after(case, writer, writer, _loader(case))


def _verified(case: Case) -> Run:
    """Load cached objects into a state dict after this process has verified them."""
    loader = _loader(case)
    return _after(case, loader, loader, loader, loader)


def _after(case: Case, *loaders: ShardedStateLoader) -> Run:
    """Load with each loader in turn, from a store that is open, and time the last one.

    If the disk is slower than a load, the cache has only a part of the objects, and the next load writes the rest.
    """
    state = case.destinations()
    store = open_store(case)
    open_it = case.open
    assert open_it is not None

    async def begin(stack: AsyncExitStack) -> None:
        stack.enter_context(_removed(_directory(case)))
        await open_it(stack)
        for loader in loaders[:-1]:
            await loader.load_weights(store, state)
        os.sync()  # so that this way does not wait for what the loads before it have written
        for destination in state.values():
            destination.fill_(0)
        touch_memory(case.data.folder, case.nbytes)

    case.open = begin

    async def run() -> None:
        await loaders[-1].load_weights(store, state)

    return run


def _local(case: Case) -> Run:
    """Load the same files from the local disk, with a store that opens them for the first time, as the cache does."""
    state = case.destinations()
    loader = ShardedStateLoader(rank=RANK, world_size=WORLD_SIZE, framework="pt")
    load_library(loader.options.framework)

    async def run() -> None:
        await loader.load_weights(case.data.rank, state)

    return run


def _disk(case: Case) -> Run:
    """Write the same number of bytes to the same disk, in pieces of 1 MiB."""
    case.nbytes = case.data.rank_bytes
    piece = os.urandom(_MIB)

    async def begin(stack: AsyncExitStack) -> None:
        stack.enter_context(_removed(_directory(case)))
        _directory(case).mkdir()
        touch_memory(case.data.folder, case.nbytes)

    case.open = begin

    def run() -> None:
        with (_directory(case) / "written").open("wb", buffering=0) as file:
            for _ in range(case.nbytes // _MIB):
                file.write(piece)

    return run


_PROCESS = """
import asyncio, json, sys
from asyncshard import AsyncShardLoader, ShardedStateLoader

url, rank, world_size, options = json.loads(sys.argv[1])

async def main():
    nbytes = 0
    async with AsyncShardLoader(ShardedStateLoader(rank=rank, world_size=world_size, **options)).stream(url) as weights:
        async for _, tensor in weights:
            nbytes += tensor.nbytes
    print(nbytes)

asyncio.run(main())
"""


def _eight(case: Case) -> Run:
    """Stream the same objects in eight processes that start together and share a disk cache."""
    assert case.endpoint is not None
    tensors = sum(placed.tensor.nbytes for placed in case.data.tensors())
    case.nbytes = _PROCESSES * tensors
    options = {
        "cache_dir": str(_directory(case)),
        "memory_budget_mb": _PROCESS_BUDGET_MB,
        "storage_options": case.endpoint.options(),
    }

    async def begin(stack: AsyncExitStack) -> None:
        stack.enter_context(_removed(_directory(case)))

    case.open = begin

    async def one() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PROCESS,
            json.dumps([_RANK_URL, RANK, WORLD_SIZE, options]),
            stdout=subprocess.PIPE,
        )
        output, _ = await process.communicate()
        return int(output)

    async def run() -> Mapping[str, float]:
        sizes = await asyncio.gather(*(one() for _ in range(_PROCESSES)))
        if sizes != [tensors] * _PROCESSES:
            raise AssertionError(f"the processes loaded {sizes} bytes instead of {tensors}")
        return {"object_bytes": case.data.rank_bytes}

    return run


_NEEDS = ("torch", "aiobotocore", "xxhash", "filelock")

DISK_CACHE = {
    "cached-first": Way(_first, _NEEDS),
    "cached-second": Way(_second, _NEEDS),
    "cached-verified": Way(_verified, _NEEDS),
    "cached-local": Way(_local, _NEEDS),
    "cached-disk": Way(_disk),
    "cached-processes": Way(_eight, _NEEDS),
}
