"""The files of a checkpoint are listed once, and each tensor is found in one of them."""

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.errors import ObjectNotFoundError
from asyncshard.loaders.locations import Locations, file_with
from asyncshard.loaders.sources import Sources
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.opened_file import read_header_of
from asyncshard.pipeline.shard_cache.cache import ShardCache
from asyncshard.stores.opening import StoreAccess

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def cache():
    return ShardCache(MemoryBudget(1), None, is_strict=False)


@pytest.fixture
def locations(cache):
    return Locations(StoreAccess(), Selection(), cache)


@pytest.fixture
def find(cache):
    """Find the file with a tensor; opening a file by its path is noted."""
    sources, opened = Sources(StoreAccess(), "np", cache.budget), []

    async def shard_at(path):
        opened.append(path.rpartition("/")[2])
        async with sources.opened(path) as folder:
            return await read_header_of(folder.store, folder.name, folder.threads, Selection().limits, None)

    async def find(location, name):
        opened.clear()
        file = await file_with(location, name, shard_at, sources)
        return (None if file is None else file.rpartition("/")[2]), list(opened)

    return find


async def test_a_tensor_is_found_by_the_index_without_opening_a_file(tmp_path, checkpoints, locations, find):
    checkpoints.write_hugging_face(tmp_path, {"a": np.ones(1)}, {"b": np.ones(1)})
    location = await locations.locate("key", tmp_path)
    assert location.file_of("b") == str(tmp_path / "model-00002-of-00002.safetensors")
    assert await find(location, "b") == ("model-00002-of-00002.safetensors", [])
    assert location.file_of("absent") is None


async def test_without_an_index_files_are_opened_in_turn(tmp_path, checkpoints, locations, find):
    checkpoints.write_ranks(tmp_path, {"a": np.ones(1)}, {"b": np.ones(1)}, {"c": np.ones(1)})
    location = await locations.locate("key", tmp_path)
    names = [f"model-rank-0-part-{part}.safetensors" for part in range(2)]
    assert await find(location, "b") == (names[1], names)


@pytest.mark.parametrize("is_indexed", [True, False])
async def test_a_name_that_may_be_tied_is_found_with_its_embedding_and_remembered(
    tmp_path, checkpoints, locations, find, is_indexed
):
    write = checkpoints.write_hugging_face if is_indexed else checkpoints.write_ranks
    write(tmp_path, {"a": np.ones(1)}, {EMBED: np.ones(1)})
    location = await locations.locate("key", tmp_path)
    file, _ = await find(location, HEAD)
    assert file == list(location.paths)[1]
    assert await find(location, HEAD) == (file, [])


async def test_a_name_that_nothing_has_is_in_no_file(tmp_path, checkpoints, locations, find):
    checkpoints.write_ranks(tmp_path, {"a": np.ones(1)})
    location = await locations.locate("key", tmp_path)
    assert (await find(location, "absent"))[0] is None


async def test_locations_are_remembered_and_charged_until_they_are_forgotten(tmp_path, checkpoints, locations, cache):
    checkpoints.write_hugging_face(tmp_path, {"a": np.ones(1)})
    assert locations.find("key") is None
    location = await locations.locate("key", tmp_path)
    assert locations.find("key") is location
    assert cache.budget.bytes_used == 2 * (tmp_path / "model.safetensors.index.json").stat().st_size
    assert locations.forget("key")
    assert not locations.forget("key")
    assert cache.budget.bytes_used == 0


async def test_clearing_forgets_all(tmp_path, checkpoints, locations, cache):
    checkpoints.write_hugging_face(tmp_path, {"a": np.ones(1)})
    for key in ("one", "two"):
        await locations.locate(key, tmp_path)
    locations.clear()
    assert (locations.find("one"), cache.budget.bytes_used) == (None, 0)


async def test_a_directory_that_is_not_there_leaves_nothing_charged(tmp_path, locations, cache):
    with pytest.raises(ObjectNotFoundError):
        await locations.locate("key", tmp_path / "absent")
    assert (locations.find("key"), cache.budget.bytes_used) == (None, 0)
