"""An update is iterated over as often as is asked, and applied to the live weights at once, to the end."""

import asyncio
import contextlib

import ml_dtypes
import numpy as np
import pytest

from asyncshard import AsyncShardLoader, ShardedStateLoader, save_sharded_state
from asyncshard.errors import DestinationError, StreamClosedError
from asyncshard.testing import MemoryStore

SIZE = 4096
CHANGED = ("layer.2", "layer.3", "layer.6")
"""Two neighbours of one shard, and one of another."""


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


# Iterating


async def test_an_update_yields_its_tensors_in_plan_order_as_often_as_asked(new, old, old_files, new_files, live):
    since = await version_of(MemoryStore(old_files))
    async with await make_loader().prepare_refresh(MemoryStore(new_files), live, since) as update:
        for _ in range(2):
            names = []
            async for name, tensor in update:
                names.append(name)
                assert np.array_equal(tensor, new[name])
                assert tensor.ctypes.data % 64 == 0
            assert tuple(names) == CHANGED
        assert is_same(live, old)
    with pytest.raises(StreamClosedError):
        aiter(update)
    with pytest.raises(StreamClosedError):
        await update.apply()


async def test_an_iteration_goes_no_further_than_the_end_of_the_update(new_files, live):
    update = await make_loader().prepare_refresh(MemoryStore(new_files), live)
    with pytest.raises(StreamClosedError):
        async for _ in update:
            await update.apply()
    await update.aclose()


# Applying


async def test_an_update_is_applied_once(new, new_files, live):
    update = await make_loader().prepare_refresh(MemoryStore(new_files), live)
    first, second = await asyncio.gather(update.apply(), update.apply(), return_exceptions=True)
    assert first is None
    assert type(second) is RuntimeError
    assert is_same(live, new)


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancel_while_it_is_applied_finishes_it(old, new, new_files, times):
    loader = make_loader()
    for count in range(1000):
        live = {name: array.copy() for name, array in old.items()}
        update = await loader.prepare_refresh(MemoryStore(new_files), live)
        task = asyncio.ensure_future(update.apply())
        await turns(count)
        for _ in range(times):
            task.cancel()
            await turns(1)
        await asyncio.wait([task])
        assert is_same(live, new if count else old)  # a task that has not begun does not begin
        if not task.cancelled():
            task.result()
            return
        await update.aclose()
        assert is_clean(loader.budget)
    raise AssertionError("it does not end")


async def test_a_loop_that_ends_lets_it_finish_and_hears_of_nothing_else(old, new, new_files):
    loader = make_loader()
    for count in range(30):
        live = {name: array.copy() for name, array in old.items()}
        update = await loader.prepare_refresh(MemoryStore(new_files), live)
        task = asyncio.ensure_future(update.apply())
        await turns(count)
        for other in asyncio.all_tasks() - {asyncio.current_task()}:
            other.cancel()
        (result,) = await asyncio.gather(task, return_exceptions=True)
        assert result is None or type(result) is asyncio.CancelledError
        assert is_same(live, new) or is_same(live, old)
        await update.aclose()
        assert is_clean(loader.budget)


async def test_nobody_sees_memory_that_is_being_given_back(new, new_files, live):
    loader = make_loader()
    update = await loader.prepare_refresh(MemoryStore(new_files), live)
    names = aiter(update)
    name, view = await anext(names)
    task = asyncio.ensure_future(update.apply())
    await turns(1)
    with pytest.raises(StreamClosedError, match="applied or closed"):
        await anext(names)
    await task
    assert np.array_equal(view, new[name])  # who holds a view keeps its memory
    assert loader.budget.bytes_held >= view.nbytes
    del view
    assert is_clean(loader.budget)
    assert loader.budget.bytes_held == 0


async def test_closing_waits_for_what_is_being_applied(new, new_files, live):
    update = await make_loader().prepare_refresh(MemoryStore(new_files), live)
    task = asyncio.ensure_future(update.apply())
    await turns(1)
    await update.aclose()
    assert is_same(live, new)
    await task


async def test_strided_narrowed_and_cast_destinations_are_filled(new, new_files, old):
    loader = make_loader()
    fused = np.zeros((1024, 2), np.float32)
    wide = np.full(2000, -1, np.float32)
    state = {name: array.copy() for name, array in old.items()}
    state |= {"layer.0": fused[:, 0], "layer.1": fused[:, 1], "layer.2": wide}
    state |= {"layer.3": np.zeros(1024, ml_dtypes.bfloat16), "layer.4": np.zeros(1024)[::-1].astype(np.float64)}
    update = await loader.prepare_refresh(MemoryStore(new_files), state, cast=True)
    assert not fused.any()
    assert (wide == -1).all()
    await update.apply()
    assert np.array_equal(fused, np.stack([new["layer.0"], new["layer.1"]], 1))
    assert np.array_equal(wide[:1024], new["layer.2"])
    assert (wide[1024:] == -1).all()
    assert np.array_equal(state["layer.3"], new["layer.3"].astype(ml_dtypes.bfloat16))
    assert np.array_equal(state["layer.4"], new["layer.4"].astype(np.float64))
    assert is_clean(loader.budget)


async def test_tensors_without_elements_and_without_dimensions_are_applied(tmp_path, checkpoints):
    tensors = {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(2.5), "byte": np.array([7], np.uint8)}
    live = {name: np.zeros_like(array) for name, array in tensors.items()}
    store = MemoryStore({"model.safetensors": checkpoints.shard(tensors)})
    update = await make_loader().prepare_refresh(store, live)
    assert {name: tensor.shape async for name, tensor in update} == {n: a.shape for n, a in tensors.items()}
    await update.apply()
    assert is_same(live, tensors)


class Collected:
    """A sink that remembers, and may fail."""

    def __init__(self, error=None):
        self.data = bytearray()
        self.error = error

    async def write(self, offset, buffer):
        await asyncio.sleep(0)
        assert offset == len(self.data)
        self.data += buffer
        if self.error is not None and offset:
            raise self.error


async def test_sinks_get_ascending_chunks_when_it_is_applied(new, new_files, live):
    sinks = {"layer.2": Collected(), "layer.7": Collected()}
    update = await make_loader(chunk_size=1024).prepare_refresh(MemoryStore(new_files), {**live, **sinks})
    assert not sinks["layer.2"].data
    await update.apply()
    for name, sink in sinks.items():
        assert bytes(sink.data) == new[name].tobytes()
    assert np.array_equal(live["layer.3"], new["layer.3"])


async def test_a_sink_that_fails_leaves_the_arrays_and_says_what_is_torn(old, new_files, live):
    loader = make_loader(chunk_size=1024)
    sinks = {"layer.2": Collected(), "layer.7": Collected(OSError("device"))}
    state = {**live, **sinks}
    update = await loader.prepare_refresh(MemoryStore(new_files), state)
    with pytest.raises(OSError, match="device") as caught:
        await update.apply()
    assert (caught.value.filled, caught.value.torn) == (("layer.2",), ("layer.7",))
    assert all(np.array_equal(live[name], old[name]) for name in old if name not in sinks)
    assert is_clean(loader.budget)


async def test_torch_parameters_are_refreshed_also_where_their_memory_has_moved(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    after = {"weight": before["weight"] + 1, "bias": before["bias"]}
    for folder, tensors in (("old", before), ("new", after)):
        await save_sharded_state(tensors, tmp_path / folder, rank=0, digests=True)
    loader = make_loader()
    since = await version_of(tmp_path / "old")
    update = await loader.prepare_refresh(tmp_path / "new", dict(model.named_parameters()), since)
    assert update.changed == ("weight",)
    async for name, tensor in update:
        assert torch.equal(tensor, after[name])
        del tensor
    assert torch.equal(model.weight, before["weight"])
    model.weight.data = model.weight.data.clone()
    await update.apply()
    assert torch.equal(model.weight, after["weight"])
    assert model.weight.requires_grad
    assert is_clean(loader.budget)


async def test_a_destination_that_fits_no_more_is_an_error_before_anything_is_written(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.zeros(4) for name in ("a", "b")}
    await save_sharded_state({name: torch.ones(4) for name in state}, tmp_path, rank=0)
    loader = make_loader()
    update = await loader.prepare_refresh(tmp_path, state)
    state["b"].data = torch.zeros(3)
    with pytest.raises(DestinationError, match="'b'"):
        await update.apply()
    assert not state["a"].any()
    assert is_clean(loader.budget)
    assert loader.budget.bytes_held == 0  # no frame of the error holds the memory
    with pytest.raises(StreamClosedError, match="applied or closed"):
        aiter(update)


async def test_tied_weights_are_refreshed_through_the_name_that_is_there(tmp_path):
    head = np.zeros(4, np.float32)
    await save_sharded_state({"embed": np.ones(4, np.float32)}, tmp_path, rank=0, digests=True)
    update = await make_loader().prepare_refresh(tmp_path, {"embed": head, "head": head})
    await update.apply()
    assert head.all()


async def test_updates_follow_one_another(old, new, old_files, new_files, live):
    loader = AsyncShardLoader(memory_budget_mb=1)
    version = await version_of(MemoryStore(old_files))
    for step in range(4):
        files, state = ((new_files, new), (old_files, old))[step % 2]
        store = MemoryStore(files, url=f"memory://step-{step}")
        async with await loader.prepare_refresh(store, live, version) as update:
            assert update.changed == CHANGED
            await update.apply()
        version = update.version
        assert is_same(live, state)
    with contextlib.suppress(AttributeError):
        update.version = None
    assert update.version == version
