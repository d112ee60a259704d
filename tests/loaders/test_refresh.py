"""`prepare_refresh` and `Update`: read what differs, then apply it at once."""

import asyncio
import contextlib
import gc
import pickle

import numpy as np
import pytest

from asyncshard import CheckpointVersion, ShardedStateLoader, save_sharded_state
from asyncshard.errors import BudgetError, ChecksumError, NamesError, StoreError
from asyncshard.stores import LocalStore
from asyncshard.testing import Fault, FaultyStore, WrapperStore

KIB, MIB = 1 << 10, 1 << 20
CHANGED = ("t3", "t4", "t11")


class CountingStore(WrapperStore):
    """Counts the bytes of tensors that are read."""

    nbytes = 0

    async def read_into(self, meta, start, buffers):
        self.nbytes += sum(buffer.nbytes for buffer in buffers)
        await super().read_into(meta, start, buffers)


def state(change=0):
    tensors = {f"t{i}": np.full(16 * KIB, i, np.int32) for i in range(16)}
    for name in CHANGED:
        tensors[name] = tensors[name] + change
    return tensors


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(params=[True, False], ids=["digests", "no digests"])
async def models(tmp_path, request):
    """Two checkpoints in directories of their own, and whether they have digests."""
    for name, change in (("old", 0), ("new", 100)):
        await save_sharded_state(
            state(change), tmp_path / name, rank=0, max_shard_size=256 * KIB, digests=request.param
        )
    return tmp_path / "old", tmp_path / "new", request.param


@pytest.fixture
async def digested(tmp_path):
    for name, change in (("old", 0), ("new", 100)):
        await save_sharded_state(state(change), tmp_path / name, rank=0, max_shard_size=256 * KIB, digests=True)
    return tmp_path / "old", tmp_path / "new"


async def loaded(path, loader):
    live = {name: np.zeros_like(tensor) for name, tensor in state().items()}
    await loader.load_weights(path, live)
    assert same(live, state())
    return live, loader.last_report.version


async def test_what_differs_is_read_and_applied_at_once(models):
    old, new, has_digests = models
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    async with CountingStore(LocalStore(str(new))) as store:
        update = await loader.prepare_refresh(store, live, since=version)
        assert sorted(update.changed) == sorted(CHANGED if has_digests else state())
        assert update.bytes_read == store.nbytes == len(update.changed) * 64 * KIB
    assert same(live, state())
    assert loader.budget.bytes_used >= update.bytes_read
    await update.apply()
    assert same(live, state(100))
    assert loader.budget.bytes_used == 0
    with pytest.raises(RuntimeError, match="applied"):
        await update.apply()


async def test_where_nothing_has_changed_no_tensor_is_read(models):
    old, _, _ = models
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    async with CountingStore(LocalStore(str(old))) as store:
        update = await loader.prepare_refresh(store, live, since=version)
        assert (update.changed, update.bytes_read, store.nbytes) == ((), 0, 0)
    await update.apply()
    assert same(live, state())


async def test_a_version_survives_a_restart(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    for copy in (CheckpointVersion.parse(str(version)), pickle.loads(pickle.dumps(version))):
        assert copy == version
        async with await ShardedStateLoader().prepare_refresh(new, live, since=copy) as update:
            assert update.changed == CHANGED
    await update.aclose()
    for wrong in ("", "{}", "nonsense", str(version)[:-40]):
        with pytest.raises(ValueError, match="version"):
            CheckpointVersion.parse(wrong)


async def test_updates_follow_each_other(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    for path, expected in ((new, state(100)), (old, state()), (new, state(100))):
        update = await loader.prepare_refresh(path, live, since=version)
        assert update.changed == CHANGED
        await update.apply()
        assert same(live, expected)
        version = update.version


async def test_without_a_version_everything_is_read(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, _ = await loaded(old, loader)
    update = await loader.prepare_refresh(new, live)
    assert sorted(update.changed) == sorted(state())
    await update.apply()
    assert same(live, state(100))


async def test_the_staged_tensors_may_be_iterated_over(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    async with await loader.prepare_refresh(new, live, since=version) as update:
        for _ in range(2):
            got = [(name, tensor.copy()) async for name, tensor in update]
            assert tuple(name for name, _ in got) == CHANGED
            assert all(np.array_equal(tensor, state(100)[name]) for name, tensor in got)
    assert same(live, state())
    assert loader.budget.bytes_used == 0


async def test_an_error_at_any_read_leaves_the_live_weights_alone(digested):
    old, new = digested
    loader = ShardedStateLoader(chunk_size=64 * KIB)
    live, version = await loaded(old, loader)
    number = 0
    while True:
        async with LocalStore(str(new)) as disk:
            store = FaultyStore(disk, {number: Fault(error=StoreError("broken"), after=1000)})
            try:
                update = await loader.prepare_refresh(store, live, since=version)
            except StoreError:
                assert same(live, state())
            else:
                break
        gc.collect()
        assert loader.budget.bytes_used == 0
        number += 1
    assert number >= 2
    await update.apply()
    assert same(live, state(100))


async def test_a_cancel_at_any_turn_leaves_the_live_weights_alone(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    for turns in range(0, 60, 3):
        task = asyncio.ensure_future(loader.prepare_refresh(new, live, since=version))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await (await task).aclose()
        assert same(live, state())
        del task
        await asyncio.sleep(0)
        gc.collect()
        assert loader.budget.bytes_used == 0


async def test_a_cancel_of_apply_finishes_it_first(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    update = await loader.prepare_refresh(new, live, since=version)
    task = asyncio.ensure_future(update.apply())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert same(live, state(100))
    await update.aclose()
    assert loader.budget.bytes_used == 0


async def test_what_does_not_fit_the_budget_is_an_error_and_may_be_written_through(digested):
    old, new = digested
    loader = ShardedStateLoader(memory_budget_mb=0.1)
    live, version = await loaded(old, loader)
    with pytest.raises(BudgetError, match=r"raise memory_budget_mb"):
        await loader.prepare_refresh(new, live, since=version)
    assert same(live, state())
    update = await loader.prepare_refresh(new, live, since=version, stage=False)
    assert same(live, state(100))
    assert [name async for name, _ in update] == list(CHANGED)
    await update.apply()


async def test_names_that_do_not_match_are_an_error_before_anything_is_read(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    live["other"] = np.zeros(3, np.int32)
    async with CountingStore(LocalStore(str(new))) as store:
        with pytest.raises(NamesError, match="other"):
            await loader.prepare_refresh(store, live, since=version)
        assert store.nbytes == 0


async def test_bytes_that_do_not_match_their_digest_are_never_applied(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    for path in new.iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # of t3, t7, t11 and t15: the last of each part
        path.write_bytes(data)
    with pytest.raises(ChecksumError, match=r"t(3|11)\b"):
        await loader.prepare_refresh(new, live, since=version)
    assert same(live, state())


async def test_strided_destinations_get_their_tensors(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live = {name: np.zeros((16 * KIB, 2), np.int32)[:, 0] for name in state()}
    await loader.load_weights(old, live)
    update = await loader.prepare_refresh(new, live, since=loader.last_report.version)
    assert update.changed == CHANGED
    await update.apply()
    assert same(live, state(100))


async def test_torch_parameters_get_their_tensors(digested):
    torch = pytest.importorskip("torch")
    old, new = digested
    loader = ShardedStateLoader()
    live = {name: torch.nn.Parameter(torch.zeros(16 * KIB, dtype=torch.int32), requires_grad=False) for name in state()}
    await loader.load_weights(old, live)
    update = await loader.prepare_refresh(new, live, since=loader.last_report.version)
    await update.apply()
    assert same({name: tensor.numpy() for name, tensor in live.items()}, state(100))


async def test_an_update_that_is_dropped_gives_its_memory_back(digested):
    old, new = digested
    loader = ShardedStateLoader()
    live, version = await loaded(old, loader)
    update = await loader.prepare_refresh(new, live, since=version)
    assert loader.budget.bytes_used > 0
    del update
    gc.collect()
    for _ in range(5):
        await asyncio.sleep(0)
    assert loader.budget.bytes_used == 0
