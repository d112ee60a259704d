"""Rank shards in memory, opened and joined, and what a reshard reads and writes them with."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.writing.reshard.block_reader import BlockReader
from asyncshard.pipeline.writing.reshard.divider import PlaceTensor
from asyncshard.pipeline.writing.reshard.source import Source, join_source, open_source
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, format_placements
from asyncshard.plan.division.placements import Placement
from asyncshard.plan.files.survey import survey_names
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import MemoryStore

Tensors = Mapping[str, np.ndarray[Any, Any]]


class Opened(NamedTuple):
    """A checkpoint in memory and the files of each of its ranks."""

    store: MemoryStore
    checkpoints: list[Checkpoint]
    threads: DaemonThreads

    def join(self, place: PlaceTensor | None = None) -> Source:
        is_ranks = any("rank" in shard.path for shard in self.checkpoints[0].shards)
        return join_source(self.checkpoints, place, path=self.store.url, is_ranks=is_ranks)

    def reader(self, source: Source) -> BlockReader:
        return BlockReader(self.store, source.shards, self.threads, Scratch(self.threads, 4096, 1))


@pytest.fixture
async def threads() -> AsyncIterator[DaemonThreads]:
    threads = DaemonThreads(1, "asyncshard-test")
    yield threads
    await threads.aclose()


@pytest.fixture
async def account() -> AsyncIterator[Account]:
    account = MemoryBudget(1).open_account()
    yield account
    account.close()


@pytest.fixture
def placed() -> Callable[..., dict[str, str]]:
    """Return the metadata that say how tensors are divided."""

    def placed(**placements: Placement) -> dict[str, str]:
        return {PLACEMENT_KEY: format_placements(placements.items())}

    return placed


@pytest.fixture
def open_files(threads: DaemonThreads, account: Account) -> Callable[..., Awaitable[Opened]]:
    """Open the files of a checkpoint, given their bytes."""

    async def open_files(files: Mapping[str, bytes]) -> Opened:
        store = MemoryStore(files)
        survey = survey_names(list(files), path=store.url)
        return Opened(store, await open_source(store, survey, None, threads, account), threads)

    return open_files


@pytest.fixture
def open_ranks(checkpoints: Any, open_files: Any) -> Callable[..., Awaitable[Opened]]:
    """Open one file for each rank's tensors; `metadata` are those of all files, or a list with those of each."""

    async def open_ranks(*ranks: Tensors, metadata: Any = None) -> Opened:
        each = metadata if isinstance(metadata, list) else [metadata] * len(ranks)
        return await open_files(
            {
                f"model-rank-{rank}-part-0.safetensors": checkpoints.shard(tensors, metadata=each[rank])
                for rank, tensors in enumerate(ranks)
            }
        )

    return open_ranks


@pytest.fixture
def open_single(checkpoints: Any, open_files: Any) -> Callable[..., Awaitable[Opened]]:
    """Open a Hugging Face checkpoint of one file."""

    async def open_single(tensors: Tensors, metadata: Any = None) -> Opened:
        return await open_files({"model.safetensors": checkpoints.shard(tensors, metadata=metadata)})

    return open_single


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A directory to be written, which is not there yet."""
    return str(tmp_path / "out")
