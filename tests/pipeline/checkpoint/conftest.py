"""Stores in memory and what their files are opened with: threads, and an account of a budget of 1 MiB."""

import pytest

from asyncshard import MemoryBudget
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.opened_file import read_header_of
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import MemoryStore


@pytest.fixture
async def threads():
    threads = DaemonThreads(1, "asyncshard-test")
    yield threads
    await threads.aclose()


@pytest.fixture
async def account():
    account = MemoryBudget(1).open_account()
    yield account
    account.close()


@pytest.fixture
def open_file(checkpoints, threads):
    """Open a file of these tensors in a store of its own; return the store and the file."""

    async def open_file(tensors, name="model.safetensors", **options):
        store = MemoryStore({name: checkpoints.shard(tensors, **options)})
        return store, await read_header_of(store, name, threads, HeaderLimits(), None)

    return open_file
