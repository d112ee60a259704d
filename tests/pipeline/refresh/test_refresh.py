"""Refreshing live weights: only what differs is read, nothing live is touched before it is applied, all of it then."""

import asyncio
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

import asyncshard
from asyncshard import AsyncShardLoader, CheckpointVersion, ShardedStateLoader, save_sharded_state
from asyncshard.errors import (
    BudgetError,
    ChecksumError,
    DestinationError,
    FormatError,
    NamesError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
)
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore, S3Server
from asyncshard.testing.fakes import WrapperStore

SIZE = 4096
CHANGED = ("layer.2", "layer.3", "layer.6")
"""Two neighbours of one shard, and one of another."""


class CountingStore(WrapperStore):
    """Remembers the ranges that are read."""

    def __init__(self, store):
        super().__init__(store)
        self.reads = []

    async def read_into(self, meta, start, buffers):
        self.reads.append((meta.name, start, sum(buffer.nbytes for buffer in buffers)))
        await super().read_into(meta, start, buffers)


async def files_of(tensors, directory, *, digests=True):
    """Return the files of a sharded state, two shards, as a mapping of name to bytes."""
    paths = await save_sharded_state(tensors, directory, rank=0, digests=digests, max_shard_size=5 * SIZE)
    return {os.path.basename(path): Path(path).read_bytes() for path in paths}


def foreign_files_of(tensors):
    """Return files as another program writes them: equal tensors make equal files."""
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[start : start + 5]} for start in range(0, len(names), 5)]
    return {f"model-rank-0-part-{number}.safetensors": save(part) for number, part in enumerate(parts)}


def is_same(state, expected):
    return all(np.array_equal(state[name], array) for name, array in expected.items())


def make_loader(**tuning):
    return ShardedStateLoader(**{"memory_budget_mb": 1, **tuning})


async def version_of(path):
    async with AsyncShardLoader(memory_budget_mb=1).stream(path) as stream:
        return stream.version


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


def is_clean(budget):
    return budget.bytes_used == 0 and not budget._accounts


# What is read


@pytest.mark.parametrize("stage", [True, False])
async def test_only_what_differs_is_read_neighbours_together(old, new, old_files, new_files, live, stage):
    loader = make_loader()
    await loader.load_weights(MemoryStore(old_files), live)
    store = CountingStore(MemoryStore(new_files, url="memory://elsewhere"))
    update = await loader.prepare_refresh(store, live, loader.last_report.version, stage=stage)
    assert update.changed == CHANGED
    assert update.bytes_read == 3 * SIZE
    assert sorted(nbytes for _, _, nbytes in store.reads) == [SIZE, 2 * SIZE]
    assert is_same(live, old if stage else new)
    await update.apply()
    assert is_same(live, new)
    assert update.version == await version_of(store)
    assert is_clean(loader.budget)


@pytest.mark.parametrize("digests", [True, False])
async def test_nothing_is_read_where_nothing_changed(old, live, tmp_path, digests):
    store = CountingStore(MemoryStore(await files_of(old, tmp_path, digests=digests)))
    update = await make_loader().prepare_refresh(store, live, await version_of(store))
    assert (update.changed, update.bytes_read, store.reads) == ((), 0, [])
    assert [name async for name, _ in update] == []
    await update.apply()
    assert is_same(live, old)


async def test_without_a_version_everything_is_read(new, new_files, live):
    update = await make_loader().prepare_refresh(MemoryStore(new_files), live)
    assert update.changed == tuple(new)
    await update.apply()
    assert is_same(live, new)


async def test_without_digests_the_shard_is_what_is_compared(old, new, live):
    old_store = MemoryStore(foreign_files_of(old))
    some = {name: new[name] if name == "layer.6" else array for name, array in old.items()}
    store = CountingStore(MemoryStore(foreign_files_of(some), url="memory://new"))
    update = await make_loader().prepare_refresh(store, live, await version_of(old_store))
    assert update.changed == ("layer.5", "layer.6", "layer.7")
    assert {name for name, _, _ in store.reads} == {"model-rank-0-part-1.safetensors"}
    await update.apply()
    assert is_same(live, some)


async def test_without_digests_each_save_differs_by_its_id(old, live, tmp_path):
    one, two = [MemoryStore(await files_of(old, tmp_path / name, digests=False)) for name in ("one", "two")]
    async with await make_loader().prepare_refresh(two, live, await version_of(one)) as update:
        assert update.changed == tuple(old)


async def test_files_of_a_disk_are_told_by_their_path_and_times(old, live, tmp_path):
    loader = make_loader()
    for folder in ("one", "two"):
        await save_sharded_state(old, tmp_path / folder, rank=0)
    since = await version_of(tmp_path / "one")
    assert (await loader.prepare_refresh(tmp_path / "one", live, since)).changed == ()
    (path,) = (tmp_path / "one").iterdir()
    status = path.stat()
    for folder in ("one", "two"):  # the times of a file say nothing of another one
        os.utime(next((tmp_path / folder).iterdir()), ns=(status.st_atime_ns, status.st_mtime_ns))
        async with await loader.prepare_refresh(tmp_path / folder, live, since) as update:
            assert update.changed == tuple(old)
    assert is_clean(loader.budget)


async def test_a_file_written_again_in_place_with_its_times_restored_is_read(old, new, live, tmp_path):
    (path,) = await save_sharded_state(old, tmp_path, rank=0)
    since = await version_of(tmp_path)
    status = os.stat(path)
    (other,) = await save_sharded_state(new, tmp_path / "other", rank=0)
    Path(path).write_bytes(Path(other).read_bytes())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    update = await make_loader().prepare_refresh(tmp_path, live, since)
    await update.apply()
    assert is_same(live, new)


async def test_a_store_without_fingerprints_is_read_whole_unless_there_are_digests(old, old_files, live, tmp_path):
    class Plain(MemoryStore):
        def fingerprint(self, meta):
            return None

    plain = Plain(await files_of(old, tmp_path / "plain", digests=False))
    async with await make_loader().prepare_refresh(plain, live, await version_of(plain)) as update:
        assert update.changed == tuple(old)
    store = Plain(old_files)
    async with await make_loader().prepare_refresh(store, live, await version_of(store)) as update:
        assert update.changed == ()


async def test_a_tensor_with_the_same_bytes_and_another_dtype_has_changed(tmp_path):
    bits = np.arange(8, dtype=np.int32)
    since = await version_of(MemoryStore(await files_of({"a": bits, "b": bits * 2}, tmp_path / "old")))
    other = {"a": bits.view(np.float32), "b": bits * 2}
    live = {"a": np.zeros(8, np.float32), "b": bits * 2}
    store = MemoryStore(await files_of(other, tmp_path / "new"))
    async with await make_loader().prepare_refresh(store, live, since) as update:
        assert update.changed == ("a",)


async def test_a_tensor_that_moved_to_another_shard_has_not_changed(old, live, tmp_path):
    since = await version_of(MemoryStore(await files_of(old, tmp_path / "old")))
    turned = dict(reversed(old.items()))
    store = CountingStore(MemoryStore(await files_of(turned, tmp_path / "new"), url="memory://new"))
    async with await make_loader().prepare_refresh(store, live, since) as update:
        assert update.changed == ()
    assert store.reads == []


async def test_large_tensors_are_read_in_chunks_and_checked_whole(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 5 * SIZE + 3, np.uint8)
    live = {"w": np.zeros_like(array), "x": np.zeros(0, np.float32)}
    files = await files_of({"w": array}, tmp_path)
    store = CountingStore(MemoryStore(files))
    update = await make_loader(chunk_size=SIZE).prepare_refresh(store, live, strict=False)
    assert len(store.reads) == 6
    await update.apply()
    assert np.array_equal(live["w"], array)


async def test_a_version_lasts_over_a_restart(old, new, tmp_path, live):
    await save_sharded_state(old, tmp_path / "old", rank=0, digests=True)
    program = """
import asyncio, pickle, sys
from asyncshard import ShardedStateLoader
async def main():
    loader = ShardedStateLoader()
    await loader.load_weights(sys.argv[1])
    sys.stdout.buffer.write(pickle.dumps((str(loader.last_report.version), loader.last_report.version)))
asyncio.run(main())
"""
    result = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, str(tmp_path / "old")],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    text, pickled = pickle.loads(result.stdout)
    await save_sharded_state(new, tmp_path / "new", rank=0, digests=True)
    for since in (CheckpointVersion.parse(text), pickled):
        async with await make_loader().prepare_refresh(tmp_path / "new", live, since) as update:
            assert update.changed == CHANGED
        assert (await make_loader().prepare_refresh(tmp_path / "old", live, since)).changed == ()


# S3


OPTIONS = {"key": "id", "secret": "secret", "region_name": "us-east-1"}


def is_data(request):
    return request.method == "GET" and "if-match" in request.headers


@pytest.fixture
async def server():
    async with S3Server() as server:
        yield server


def put_all(server, prefix, files, **more):
    for name, data in files.items():
        server.put("models", f"{prefix}/{name}", data, **more)
    return f"s3://models/{prefix}"


@pytest.fixture
def s3_loader(server):
    return make_loader(storage_options={"endpoint_url": server.endpoint_url, **OPTIONS})


@pytest.mark.parametrize("digests", [True, False])
async def test_nothing_changed_in_s3_asks_for_no_data(server, s3_loader, old, live, tmp_path, digests):
    files = await files_of(old, tmp_path, digests=digests)
    first, second = put_all(server, "first", files), put_all(server, "second", files)
    await s3_loader.load_weights(first, live)
    since = s3_loader.last_report.version
    for url in (first, second):  # an ETag that is an MD5 says that the content is the same
        server.requests.clear()
        update = await s3_loader.prepare_refresh(url, live, since)
        assert update.changed == ()
        assert not [request for request in server.requests if is_data(request)]


async def test_what_changed_below_a_new_prefix_of_s3_is_read_alone(
    server, s3_loader, old, new, old_files, new_files, live
):
    await s3_loader.load_weights(put_all(server, "step-1", old_files), live)
    since = CheckpointVersion.parse(str(s3_loader.last_report.version))
    url = put_all(server, "step-2", new_files)
    server.requests.clear()
    update = await s3_loader.prepare_refresh(url, live, since)
    ranges = [request.headers["range"] for request in server.requests if is_data(request)]
    sizes = [int(stop) - int(start) + 1 for start, stop in (text.removeprefix("bytes=").split("-") for text in ranges)]
    assert sorted(sizes) == [SIZE, 2 * SIZE]
    assert is_same(live, old)
    await update.apply()
    assert is_same(live, new)


async def test_etags_that_are_no_md5_say_nothing_of_another_path(server, s3_loader, old, live, tmp_path):
    files = await files_of(old, tmp_path, digests=False)
    first, second = (put_all(server, prefix, files, etag='"opaque"') for prefix in ("first", "second"))
    await s3_loader.load_weights(first, live)
    since = s3_loader.last_report.version
    assert (await s3_loader.prepare_refresh(first, live, since)).changed == ()
    async with await s3_loader.prepare_refresh(second, live, since) as update:
        assert update.changed == tuple(old)


async def test_the_md5_of_a_multipart_upload_tells_the_content(server, s3_loader, old, live, tmp_path):
    files = await files_of(old, tmp_path, digests=False)
    etag = f'"{"0123456789abcdef" * 2}-3"'
    first, second = (put_all(server, prefix, files, etag=etag) for prefix in ("first", "second"))
    await s3_loader.load_weights(first, live)
    assert (await s3_loader.prepare_refresh(second, live, s3_loader.last_report.version)).changed == ()


# Live weights are untouched until they are applied


@pytest.mark.parametrize("after", [0, 1000])
@pytest.mark.parametrize("broken", range(4))
async def test_an_error_at_any_read_leaves_the_live_weights(old, new_files, live, broken, after):
    loader = make_loader(chunk_size=SIZE)
    fault = Fault(after=after, error=StoreError("broken"))
    store = FaultyStore(MemoryStore(new_files), {broken: fault})
    with pytest.raises(StoreError, match="broken") as caught:
        await loader.prepare_refresh(store, live)
    assert (caught.value.filled, caught.value.torn) == ((), ())
    assert is_same(live, old)
    assert is_clean(loader.budget)


async def test_a_missing_shard_or_checkpoint_leaves_the_live_weights(old, new_files, live):
    loader = make_loader()
    store = FaultyStore(MemoryStore(new_files), opens={"model-rank-0-part-1.safetensors": Fault(error=StoreError("x"))})
    with pytest.raises(StoreError):
        await loader.prepare_refresh(store, live)
    with pytest.raises(ObjectNotFoundError):
        await loader.prepare_refresh(MemoryStore({}), live)
    assert is_same(live, old)
    assert is_clean(loader.budget)


async def test_an_object_replaced_meanwhile_leaves_the_live_weights(old, old_files, new_files, live):
    loader = make_loader()
    memory = MemoryStore(new_files)
    store = GatedStore(memory)
    task = asyncio.ensure_future(loader.prepare_refresh(store, live))
    await store.waiting(1)
    for name, data in old_files.items():
        memory.replace(name, data)
    store.open_all()
    with pytest.raises(ObjectChangedError):
        await task
    assert is_same(live, old)
    assert is_clean(loader.budget)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancel_at_any_turn_leaves_the_live_weights_and_nothing_else(old, old_files, new_files, live, times):
    loader = make_loader(chunk_size=SIZE)
    since = await version_of(MemoryStore(old_files))
    for count in range(10_000):
        task = asyncio.ensure_future(loader.prepare_refresh(MemoryStore(new_files), live, since))
        await turns(count)
        for _ in range(times):
            task.cancel()
            await turns(1)
        await asyncio.wait([task])
        assert is_same(live, old)
        if not task.cancelled():
            assert task.result().changed == CHANGED
            await task.result().aclose()
            assert is_clean(loader.budget)
            return
        del task
        gc.collect() if count % 50 == 0 else None
        assert is_clean(loader.budget)
    raise AssertionError("it does not end")


async def test_a_cancel_waits_for_the_reads_that_write(old, new_files, live):
    loader = make_loader()
    store = GatedStore(MemoryStore(new_files), is_stubborn=True)
    task = asyncio.ensure_future(loader.prepare_refresh(store, live))
    await store.waiting(2)
    task.cancel()
    await turns(20)
    assert not task.done()
    store.open_all()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert is_same(live, old)
    assert is_clean(loader.budget)


async def test_names_and_shapes_are_checked_before_anything_is_read(new_files, live):
    loader = make_loader()
    store = CountingStore(MemoryStore(new_files))
    with pytest.raises(NamesError):
        await loader.prepare_refresh(store, {**live, "more": np.zeros(3)})
    with pytest.raises(NamesError):
        await loader.prepare_refresh(store, {"layer.0": live["layer.0"]})
    with pytest.raises(DestinationError):
        await loader.prepare_refresh(store, {**live, "layer.0": np.zeros(3, np.float32)})
    with pytest.raises(DestinationError, match="cast=True"):
        await loader.prepare_refresh(store, {**live, "layer.0": live["layer.0"].astype(np.float16)})
    with pytest.raises(TypeError, match="CheckpointVersion"):
        await loader.prepare_refresh(store, live, "a version")
    assert store.reads == []
    assert is_clean(loader.budget)


async def test_with_strict_off_what_matches_is_refreshed_and_the_rest_reported(old, new, new_files, live):
    loader = make_loader()
    state = {"layer.2": live["layer.2"], "more": np.zeros(3)}
    update = await loader.prepare_refresh(MemoryStore(new_files), state, strict=False)
    assert loader.last_report.missing == ("more",)
    assert "layer.3" in loader.last_report.unexpected
    assert loader.last_report.version is None
    assert update.changed == ("layer.2",)
    await update.apply()
    assert np.array_equal(live["layer.2"], new["layer.2"])
    assert np.array_equal(live["layer.3"], old["layer.3"])


async def test_a_load_that_failed_reports_no_version(old_files, live):
    loader = make_loader(chunk_size=SIZE)
    store = FaultyStore(MemoryStore(old_files), {1: Fault(error=StoreError("broken"))})
    with pytest.raises(StoreError):
        await loader.load_weights(store, live)
    assert loader.last_report.version is None


# Digests that are wrong


def damaged(files, name, at=-1):
    """Flip a bit of a file's data."""
    data = bytearray(files[name])
    data[at] ^= 1
    return {**files, name: bytes(data)}


@pytest.mark.parametrize("stage", [True, False])
@pytest.mark.parametrize("chunk_size", [1024, 1 << 20])
async def test_bytes_that_do_not_match_their_digest_are_an_error(old, new_files, live, stage, chunk_size):
    loader = make_loader(chunk_size=chunk_size)
    files = damaged(new_files, "model-rank-0-part-1.safetensors")
    with pytest.raises(ChecksumError) as caught:
        await loader.prepare_refresh(MemoryStore(files), live, stage=stage)
    assert caught.value.tensor in str(caught.value)
    assert caught.value.tensor in old
    assert caught.value.path == "memory://checkpoint/model-rank-0-part-1.safetensors"
    if stage:
        assert is_same(live, old)
    else:
        assert caught.value.tensor in caught.value.torn
    assert is_clean(loader.budget)


async def test_malformed_digests_stop_a_refresh_and_no_load(old, live, checkpoints):
    store = MemoryStore({"model.safetensors": checkpoints.shard(old, metadata={DIGESTS_KEY: "00"})})
    loader = make_loader()
    await loader.load_weights(store, live)
    since = loader.last_report.version
    assert (await loader.prepare_refresh(store, live, since)).changed == ()
    with pytest.raises(FormatError, match="digests"):
        await loader.prepare_refresh(store, live)
    assert is_clean(loader.budget)


async def test_digests_that_cannot_be_checked_are_an_error(new_files, live, monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    store = CountingStore(MemoryStore(new_files))
    loader = make_loader()
    with pytest.raises(ImportError, match=r"asyncshard\[cache\]"):
        await loader.prepare_refresh(store, live)
    assert store.reads == []
    assert is_clean(loader.budget)
    assert (await loader.prepare_refresh(store, live, await version_of(store))).changed == ()


# The budget


async def test_what_does_not_fit_the_budget_is_an_error_before_anything_is_read(new_files, live):
    loader = make_loader(memory_budget_mb=6 * SIZE / (1 << 20))
    store = CountingStore(MemoryStore(new_files))
    with pytest.raises(BudgetError) as caught:
        await loader.prepare_refresh(store, live)
    assert caught.value.needed_bytes > caught.value.budget_bytes == 6 * SIZE
    assert f"{caught.value.needed_bytes:,}" in str(caught.value)
    assert "stage=False" in str(caught.value)
    assert store.reads == []
    assert is_clean(loader.budget)


async def test_a_change_that_fits_is_read_though_the_whole_does_not(new, old_files, new_files, live):
    loader = make_loader(memory_budget_mb=6 * SIZE / (1 << 20))
    since = await version_of(MemoryStore(old_files))
    update = await loader.prepare_refresh(MemoryStore(new_files), live, since)
    assert loader.budget.bytes_used == 3 * SIZE
    await update.apply()
    assert is_same(live, new)
    assert is_clean(loader.budget)


async def test_an_update_waits_for_the_memory_of_another_one(new_files, live):
    loader = make_loader(memory_budget_mb=14 * SIZE / (1 << 20))
    stores = [MemoryStore(new_files) for _ in range(3)]
    pending = {asyncio.ensure_future(loader.prepare_refresh(store, live)) for store in stores}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        (task,) = done
        assert 8 * SIZE <= loader.budget.bytes_used <= loader.budget.nbytes
        await task.result().aclose()
    assert is_clean(loader.budget)


async def test_a_cancel_while_waiting_for_the_budget_leaves_nothing(new_files, live):
    loader = make_loader(memory_budget_mb=14 * SIZE / (1 << 20))
    async with await loader.prepare_refresh(MemoryStore(new_files), live):
        task = asyncio.ensure_future(loader.prepare_refresh(MemoryStore(new_files), live))
        for _ in range(1_000_000):  # threads have work to do before
            if loader.budget._waiters:
                break
            await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert is_clean(loader.budget)


async def test_write_through_needs_no_budget(new, new_files, live):
    loader = make_loader(memory_budget_mb=3 * SIZE / (1 << 20))
    update = await loader.prepare_refresh(MemoryStore(new_files), live, stage=False)
    assert loader.budget.bytes_used == 0
    assert is_same(live, new)
    assert loader.last_report.version == update.version
    assert {name: array is live[name] async for name, array in update} == dict.fromkeys(new, True)
    await update.apply()
    with pytest.raises(RuntimeError, match="applied"):
        await update.apply()


async def test_an_update_that_waits_does_not_hold_up_a_load_in_place(new, new_files, live):
    loader = make_loader(memory_budget_mb=14 * SIZE / (1 << 20))
    state = {name: np.zeros_like(array) for name, array in new.items()}
    async with await loader.prepare_refresh(MemoryStore(new_files), live):
        await loader.load_weights(MemoryStore(new_files), state)
    assert is_same(state, new)
    assert is_clean(loader.budget)


async def test_write_through_tells_what_is_whole_and_what_is_torn(new_files, live):
    store = FaultyStore(MemoryStore(new_files), {2: Fault(after=100, error=StoreError("broken"))})
    with pytest.raises(StoreError) as caught:
        await make_loader(chunk_size=SIZE, prefetch_count=1).prepare_refresh(store, live, stage=False)
    assert caught.value.filled == ("layer.0", "layer.1")
    assert caught.value.torn == ("layer.2",)


async def test_a_dropped_update_gives_its_memory_back(new_files, live):
    loader = make_loader()
    update = await loader.prepare_refresh(MemoryStore(new_files), live)
    assert loader.budget.bytes_used >= 8 * SIZE
    del update
    assert is_clean(loader.budget)


def test_an_update_dropped_after_its_loop_gives_its_memory_back(new_files, live):
    loader = make_loader()
    updates = [asyncio.run(loader.prepare_refresh(MemoryStore(new_files), live))]
    updates.clear()
    assert is_clean(loader.budget)


async def test_tensors_kept_after_the_end_count_as_held(new, new_files, live):
    loader = make_loader()
    async with await loader.prepare_refresh(MemoryStore(new_files), live) as update:
        kept = {name: tensor async for name, tensor in update}
    assert is_clean(loader.budget)
    assert loader.budget.bytes_held >= 8 * SIZE
    assert is_same(kept, new)
    kept.clear()
    assert loader.budget.bytes_held == 0
