"""Two checkpoints of eight tensors, three of which differ, and weights that were loaded from the first."""

import os
from pathlib import Path

import pytest

from asyncshard import save_sharded_state

SIZE = 4096
CHANGED = ("layer.2", "layer.3", "layer.6")


async def files_of(tensors, directory, *, digests=True):
    """Return the files of a sharded state, two shards, as a mapping of name to bytes."""
    paths = await save_sharded_state(tensors, directory, rank=0, digests=digests, max_shard_size=5 * SIZE)
    return {os.path.basename(path): Path(path).read_bytes() for path in paths}


@pytest.fixture(scope="session")
def old(checkpoints):
    return checkpoints.tensors(8, nbytes=SIZE)


@pytest.fixture(scope="session")
def new(old):
    return {name: array + 1000 if name in CHANGED else array for name, array in old.items()}


@pytest.fixture
async def old_files(old, tmp_path):
    return await files_of(old, tmp_path / "old")


@pytest.fixture
async def new_files(new, tmp_path):
    return await files_of(new, tmp_path / "new")


@pytest.fixture
def live(old):
    return {name: array.copy() for name, array in old.items()}
