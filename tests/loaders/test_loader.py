"""The base of all loaders: what one that is built on another takes over, its report, and its plan."""

import pickle

import numpy as np
import pytest

from asyncshard import AsyncShardLoader, MemoryBudget, ShardedStateLoader
from asyncshard.errors import NamesError
from asyncshard.loaders.loader import Loader, LoadReport, inherited
from asyncshard.loaders.options import Options
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.testing import FaultyStore, MemoryStore


@pytest.fixture
def base():
    return ShardedStateLoader(rank=1, world_size=2, memory_budget_mb=3, chunk_size=4096, max_tensors=7)


def test_a_loader_on_a_base_has_its_files_its_options_and_its_budget(base):
    selection, options, budget, disk_cache = inherited(base, {})
    assert (selection, options, disk_cache) == (base.selection, base.options, None)
    assert budget is base.budget


def test_keywords_that_are_not_none_take_the_place_of_the_bases_options(base):
    selection, options, _, _ = inherited(base, {"chunk_size": 8192, "max_tensors": 5, "prefetch_count": None})
    assert (options.chunk_size, options.prefetch_count, options.max_tensors) == (8192, None, 5)
    assert (selection.rank, selection.limits.max_tensors) == (1, 5)


@pytest.mark.parametrize("keyword", ["memory_budget_mb", "budget"])
def test_a_size_or_a_budget_of_its_own_is_not_shared(base, keyword):
    value = MemoryBudget(5) if keyword == "budget" else 5
    assert inherited(base, {keyword: value}).budget is None


def test_without_a_base_the_defaults_stand():
    assert inherited(None, {}) == (Selection(), Options(), None, None)


def test_a_base_that_is_no_loader_is_an_error():
    with pytest.raises(TypeError, match="must be one of asyncshard's loaders"):
        inherited("model", {})


def test_a_disk_cache_is_shared_if_the_options_ask_for_the_same(tmp_path):
    base = ShardedStateLoader(cache_dir=tmp_path)
    assert inherited(base, {}).disk_cache is not None
    assert inherited(base, {"cache_max_gb": 3.0}).disk_cache is None


def test_blocks_for_a_disk_cache_take_an_eighth_of_the_budget(tmp_path):
    assert ShardedStateLoader(memory_budget_mb=8, cache_dir=tmp_path).access.write_buffer_bytes == 1 << 20


def test_a_pickled_loader_has_the_same_options_and_a_budget_of_its_own(base):
    copy = pickle.loads(pickle.dumps(Loader(base.selection, base.options)))
    assert (copy.selection, copy.options) == (base.selection, base.options)
    assert copy.budget is not base.budget


async def test_a_report_tells_how_the_names_of_the_last_load_matched(checkpoints):
    store = MemoryStore(checkpoints.rank_files({"w": np.ones(3), "extra": np.ones(1)}))
    loader = ShardedStateLoader(memory_budget_mb=1)
    assert loader.last_report is None
    await loader.load_weights(store, {"w": np.zeros(4), "absent": np.zeros(1)}, strict=False)
    assert loader.last_report == LoadReport(("absent",), ("extra",), ("w",))
    assert loader.last_report.version is not None
    await loader.load_weights(store)
    assert loader.last_report == LoadReport((), (), ())


async def test_a_load_that_cannot_be_opened_leaves_the_report_as_it_was(checkpoints):
    loader = ShardedStateLoader(memory_budget_mb=1)
    with pytest.raises(NamesError):
        await loader.load_weights(MemoryStore(checkpoints.rank_files({"w": np.ones(3)})), {"absent": np.zeros(1)})
    assert loader.last_report is None


async def test_a_plan_reads_no_tensor(checkpoints):
    tensors = checkpoints.tensors(2, nbytes=1 << 20)
    store = FaultyStore(MemoryStore(checkpoints.rank_files(tensors)))
    plan = await AsyncShardLoader(memory_budget_mb=4).plan_weights(store)
    assert (plan.tensors, plan.bytes_needed, plan.bytes_read) == (2, 2 << 20, 2 << 20)
    assert store.reads_begun == 0
