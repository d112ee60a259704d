"""`cache_dir` and `cache_max_gb`: what loaders do with a cache, and `verify_cache`."""

import pickle
import subprocess
import sys
from contextlib import asynccontextmanager

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, IncrementalShardLoader, ShardedStateLoader, verify_cache
from asyncshard.errors import BudgetError, ObjectNotFoundError
from asyncshard.testing import FaultyStore, MemoryStore, S3Server

MIB = 1 << 20


@pytest.fixture
def model(checkpoints):
    tensors = {f"t{number}": np.full(MIB, number, np.uint8) for number in range(9)}
    return tensors, checkpoints.rank_files(tensors)


@asynccontextmanager
async def serving(files):
    """Serve files as a model in S3; yields the server and the storage options that reach it."""
    async with S3Server() as server:
        for name, data in files.items():
            server.put("models", f"m/{name}", data)
        yield server, {"endpoint_url": server.endpoint_url, "unsigned": True, "region_name": "us-east-1"}


@pytest.fixture
def entries(tmp_path):
    return lambda: sorted((tmp_path / "cache" / "entries").glob("*"))


async def test_a_second_load_of_an_object_in_s3_reads_the_local_disk(tmp_path, model, checkpoints):
    tensors, files = model
    async with serving(files) as (server, options):
        sent = []
        for _ in range(2):
            weights = await asyncshard.load("s3://models/m", cache_dir=tmp_path / "cache", storage_options=options)
            assert checkpoints.same(weights, tensors)
            sent.append(server.bytes_sent)
    assert sent[0] >= 9 * MIB
    assert sent[1] - sent[0] < MIB


async def test_streams_and_loads_in_place_read_through_the_disk_cache(tmp_path, model, checkpoints):
    tensors, files = model
    store = FaultyStore(MemoryStore(files))
    loader = AsyncShardLoader(cache_dir=str(tmp_path / "cache"))
    async with loader.stream(store) as stream:
        assert checkpoints.same({name: np.array(tensor) async for name, tensor in stream}, tensors)
    begun = store.reads_begun
    assert begun > 0
    into = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await loader.stream(store, into).drain()
    assert checkpoints.same(into, tensors)
    assert store.reads_begun == begun


async def test_without_cache_dir_no_object_is_kept(tmp_path, model):
    _, files = model
    store = FaultyStore(MemoryStore(files))
    for number in (1, 2):
        await asyncshard.load(store)
        assert store.reads_begun % number == 0
    assert store.reads_begun >= 2
    assert list(tmp_path.iterdir()) == []


async def test_local_files_are_not_kept(tmp_path, checkpoints, model):
    tensors, _ = model
    path = checkpoints.write_ranks(tmp_path / "model", tensors)
    assert checkpoints.same(await asyncshard.load(path, cache_dir=tmp_path / "cache"), tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


async def test_cache_max_gb_bounds_the_directory(tmp_path, model, entries):
    _, files = model
    for url in ("memory://one", "memory://two", "memory://three"):
        await asyncshard.load(MemoryStore(files, url), cache_dir=tmp_path / "cache", cache_max_gb=20 / 1024)
    assert len(entries()) == 2
    assert sum(path.stat().st_blocks * 512 for path in entries()) <= 20 * MIB


def test_a_loader_on_a_base_shares_its_disk_cache_unless_the_options_name_another(tmp_path):
    base = ShardedStateLoader(cache_dir=tmp_path)
    assert AsyncShardLoader(base)._disk_cache is base._disk_cache is not None
    assert AsyncShardLoader(base, cache_max_gb=1)._disk_cache.max_bytes == 1 << 30
    assert AsyncShardLoader(base, cache_dir=tmp_path / "x")._disk_cache.directory == str(tmp_path / "x")
    assert AsyncShardLoader()._disk_cache is None
    assert base._disk_cache.max_bytes == 100 << 30


def test_a_very_large_cache_max_gb_is_no_limit_and_a_path_of_bytes_is_an_error():
    class BytesPath:
        def __fspath__(self):
            return b"cache"

    assert ShardedStateLoader(cache_dir="cache", cache_max_gb=1e300)._disk_cache.max_bytes == sys.maxsize
    with pytest.raises(TypeError, match="path of str"):
        ShardedStateLoader(cache_dir=BytesPath())


async def test_a_loader_with_a_cache_pickles(tmp_path, model, checkpoints):
    tensors, files = model
    loader = pickle.loads(pickle.dumps(ShardedStateLoader(cache_dir=tmp_path / "cache")))
    for _ in range(2):
        assert checkpoints.same(await loader.load_weights(MemoryStore(files)), tensors)


async def test_verify_cache_counts_blocks_that_match_and_drops_the_others(tmp_path, model, entries, caplog):
    _, files = model
    for url in ("memory://one", "memory://two"):
        await asyncshard.load(MemoryStore(files, url), cache_dir=tmp_path / "cache")
    report = await verify_cache(tmp_path / "cache")
    assert (report.entries, report.blocks, report.nbytes, report.dropped) == (2, 20, 2 * size_of(files), ())
    bad = entries()[0]
    with bad.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"\xff\xfe")
    report = await verify_cache(str(tmp_path / "cache"))
    assert (report.entries, report.blocks, report.dropped) == (1, 10, (str(bad),))
    assert not bad.exists()
    assert str(bad) in caplog.text
    for path in entries():
        path.write_bytes(b"no entry")
    assert (await verify_cache(tmp_path / "cache")).entries == 0
    assert entries() == []


def size_of(files):
    return sum(map(len, files.values()))


async def test_verify_cache_of_an_empty_directory_counts_nothing(tmp_path):
    report = await verify_cache(tmp_path)
    assert (report.entries, report.blocks, report.nbytes, report.dropped) == (0, 0, 0, ())
    with pytest.raises(ObjectNotFoundError, match="nowhere"):
        await verify_cache(tmp_path / "nowhere")


WITHOUT = """
import sys
sys.modules["xxhash"] = None
import asyncshard
asyncshard.AsyncShardLoader()
try:
    asyncshard.AsyncShardLoader(cache_dir="x")
except ImportError as error:
    assert "pip install 'asyncshard[cache]'" in str(error) and "xxhash" in str(error), error
else:
    raise AssertionError
"""


def test_a_missing_package_is_an_error_that_says_what_to_install():
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, timeout=60)


async def test_write_buffers_take_an_eighth_of_the_budget_at_most(tmp_path, model, checkpoints):
    tensors, files = model
    peak = 0
    loader = AsyncShardLoader(cache_dir=tmp_path / "cache", memory_budget_mb=32)
    async with loader.stream(MemoryStore(files)) as stream:
        assert loader.budget.bytes_used >= 4 * MIB
        async for name, tensor in stream:
            peak = max(peak, loader.budget.bytes_used)
            assert np.array_equal(tensor, tensors[name])
            del tensor
    assert peak <= 32 * MIB
    assert loader.budget.bytes_used == 0
    with pytest.raises(BudgetError, match="cache's buffers"):
        await asyncshard.load(MemoryStore(files), cache_dir=tmp_path / "cache", memory_budget_mb=1)


async def test_an_incremental_loader_reads_through_the_disk_cache_and_counts_its_buffers(tmp_path, model, checkpoints):
    tensors, files = model
    async with serving(files) as (server, options):
        sent = []
        for _ in range(2):
            loader = IncrementalShardLoader(cache_dir=tmp_path / "cache", memory_budget_mb=64, storage_options=options)
            async with loader:
                (name,) = files
                shard = await loader.load_shard(f"s3://models/m/{name}")
                assert checkpoints.same(dict(shard), tensors)
                assert loader.budget.bytes_used >= (8 + 9) * MIB
                del shard
            assert loader.budget.bytes_used == 0
            sent.append(server.bytes_sent)
    assert sent[1] - sent[0] < MIB
