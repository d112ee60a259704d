"""Cancelling at every point where a load waits: nothing is left, no item is lost, and the next load is right."""

import asyncio
import contextlib

import numpy as np
import pytest

from asyncshard import AsyncShardLoader
from asyncshard.errors import StoreError
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore

SIZE = 4096


@pytest.fixture(scope="session")
def tensors(checkpoints):
    return checkpoints.tensors(8, nbytes=SIZE)


@pytest.fixture(scope="session")
def files(checkpoints, tensors):
    names = list(tensors)
    return checkpoints.rank_files(*({name: tensors[name] for name in names[at : at + 4]} for at in (0, 4)))


def make_loader(**tuning):
    return AsyncShardLoader(**{"memory_budget_mb": 1, "chunk_size": SIZE, "prefetch_count": 3, **tuning})


async def turns(count):
    for _ in range(count):
        await asyncio.sleep(0)


def arrays_for(tensors):
    return {name: np.zeros_like(tensor) for name, tensor in tensors.items()}


def others():
    return asyncio.all_tasks() - {asyncio.current_task()}


async def cancel_at_every_turn(load, check, *, stride=1, times=1):
    """Run `load()` again and again, cancelled after one more turn of the loop each time, until it ends by itself."""
    for count in range(0, 100_000, stride):
        task = asyncio.ensure_future(load())
        await turns(count)
        for _ in range(times):
            task.cancel()
            await turns(1)
        await asyncio.wait([task])
        assert not others()
        is_ended = not task.cancelled()
        if is_ended:
            task.result()
        del task  # it keeps the cancellation, that the frames, and these the last tensor
        await check()
        if is_ended:
            return
    raise AssertionError("the load does not end")


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("order", ["plan", "completion"])
async def test_a_stream_cancelled_anywhere_leaves_nothing_and_the_next_load_is_right(
    files, tensors, checkpoints, times, order
):
    loader = make_loader(order=order)
    store = MemoryStore(files)

    async def load():
        async with loader.stream(store) as stream:
            async for _ in stream:
                pass

    async def check():
        assert loader.budget.bytes_used == loader.budget.bytes_held == 0

    await cancel_at_every_turn(load, check, times=times)
    async with loader.stream(store) as stream:
        got = {name: tensor async for name, tensor in stream}
    assert checkpoints.same(dict(sorted(got.items())), tensors)


async def test_a_stream_without_a_context_cancelled_anywhere_leaves_nothing(files):
    loader = make_loader()
    store = MemoryStore(files)

    async def load():
        async for _ in loader.stream(store):
            pass

    for count in range(100_000):
        task = asyncio.ensure_future(load())
        await turns(count)
        task.cancel()
        await asyncio.wait([task])
        is_cancelled = task.cancelled()
        del task  # the stream dies with it
        while rest := others():
            await asyncio.wait(rest)
        assert loader.budget.bytes_used == 0
        if not is_cancelled:
            break


async def test_a_load_from_disk_cancelled_anywhere_leaves_nothing(tensors, checkpoints, tmp_path):
    checkpoints.write_hugging_face(tmp_path, tensors)
    loader = make_loader()

    async def load():
        async with loader.stream(tmp_path) as stream:
            async for _ in stream:
                pass

    async def check():
        assert loader.budget.bytes_used == loader.budget.bytes_held == 0

    for times in (1, 2):
        await cancel_at_every_turn(load, check, stride=3, times=times)


async def test_a_load_into_arrays_cancelled_anywhere_writes_nothing_afterwards(files, tensors):
    loader = make_loader()
    store = MemoryStore(files)
    arrays = arrays_for(tensors)

    async def load():
        async with loader.stream(store, into=arrays) as stream:
            async for _ in stream:
                pass

    async def check():
        for array in arrays.values():
            array[:] = -1
        await turns(5)
        assert all((array == -1).all() for array in arrays.values())

    await cancel_at_every_turn(load, check)


async def test_every_way_of_loading_may_be_cancelled_anywhere(files, tensors):
    loader = make_loader()
    store = MemoryStore(files)
    arrays = arrays_for(tensors)

    async def check():
        assert loader.budget.bytes_used == 0

    async def drain():
        await loader.stream(store, into=arrays).drain()

    await cancel_at_every_turn(lambda: loader.load_weights_async(store), check)
    await cancel_at_every_turn(drain, check)


async def test_cancelling_the_next_item_loses_none(files, tensors, checkpoints):
    store = MemoryStore(files)
    for count in range(40):
        async with contextlib.aclosing(make_loader().stream(store)) as stream:  # the first item opens it
            got = {}
            while len(got) < len(tensors):
                asked = asyncio.ensure_future(anext(stream))
                await turns(count)
                if asked.cancel():
                    await asyncio.wait([asked])
                if asked.cancelled():
                    asked = asyncio.ensure_future(anext(stream))
                name, tensor = await asked
                got[name] = tensor
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        assert checkpoints.same(got, tensors)


async def test_a_stream_into_arrays_goes_on_after_a_cancelled_next_item(files, tensors, checkpoints):
    for count in range(12):
        store = GatedStore(MemoryStore(files))
        arrays = arrays_for(tensors)
        async with make_loader().stream(store, into=arrays) as stream:
            asked = asyncio.ensure_future(anext(stream))
            (await store.waiting(3))[1].open()
            await turns(count)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await asked
            assert store.gates == []
            assert set(caught.value.filled) <= {"layer.1"}
            assert set(caught.value.torn) <= {"layer.0", "layer.1", "layer.2"}
            store.open_all()
            assert [name async for name, _ in stream] == list(tensors)
        assert checkpoints.same(arrays, tensors)


async def test_a_cancelled_load_into_arrays_waits_for_reads_that_cannot_stop(files, tensors):
    store = GatedStore(MemoryStore(files), is_stubborn=True)
    arrays = arrays_for(tensors)
    task = asyncio.ensure_future(make_loader().stream(store, into=arrays).drain())
    gates = await store.waiting(3)
    for _ in range(3):
        task.cancel()
        await turns(20)
        assert not task.done()
    gates[0].open()
    gates[2].open()
    await turns(20)
    assert not task.done()
    gates[1].open()
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    for array in arrays.values():
        array[:] = -1
    await turns(20)
    assert all((array == -1).all() for array in arrays.values())
    assert set(caught.value.filled) | set(caught.value.torn) == {"layer.0", "layer.1", "layer.2"}


async def test_a_cancelled_next_item_into_arrays_waits_for_reads_that_cannot_stop(files, tensors, checkpoints):
    store = GatedStore(MemoryStore(files), is_stubborn=True)
    arrays = arrays_for(tensors)
    async with make_loader().stream(store, into=arrays) as stream:
        asked = asyncio.ensure_future(anext(stream))
        gates = await store.waiting(3)
        for _ in range(3):
            asked.cancel()
            await turns(20)
            assert not asked.done()
        for gate in gates:
            gate.open()
        with pytest.raises(asyncio.CancelledError):
            await asked
        for array in arrays.values():
            array[:] = -1
        await turns(20)
        assert all((array == -1).all() for array in arrays.values())
        store.open_all()
        assert [name async for name, _ in stream] == list(tensors)
    # What had been read when the caller overwrote it is the caller's loss; the others are right.
    assert checkpoints.same(
        {name: arrays[name] for name in list(tensors)[3:]}, {name: tensors[name] for name in list(tensors)[3:]}
    )


async def test_waiting_for_reads_that_cannot_stop_does_not_spin(files, tensors):
    store = GatedStore(MemoryStore(files), is_stubborn=True)
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(make_loader().stream(store, into=arrays_for(tensors)).drain())
    await store.waiting(3)
    task.cancel()
    await turns(50)
    # Nothing is left to run: a callback at the end of the queue comes in the very next turn, again and again.
    calls = []
    original = loop.call_soon

    def call_soon(callback, *args, **kwargs):
        calls.append(callback)
        return original(callback, *args, **kwargs)

    if isinstance(loop, asyncio.SelectorEventLoop):
        loop.call_soon = call_soon
        await turns(50)
        del loop.call_soon
        assert len(calls) <= 50  # this task's own
    store.open_all()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_second_cancel_during_cleanup_does_not_cut_it_short(files):
    store = GatedStore(MemoryStore(files), is_stubborn=True)
    loader = make_loader()

    async def load():
        async with loader.stream(store) as stream:
            await anext(stream)

    task = asyncio.ensure_future(load())
    gates = await store.waiting(3)
    for _ in range(4):
        task.cancel()
        await turns(20)
    assert not task.done()
    for gate in gates:
        gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not others()
    assert loader.budget.bytes_used == loader.budget.bytes_held == 0


async def test_a_timeout_is_a_timeout_error_and_leaves_nothing(files, tensors):
    loader = make_loader()
    for into in (None, arrays_for(tensors)):
        store = FaultyStore(MemoryStore(files), {3: Fault(hang=asyncio.Event())})
        got = []
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit, loader.stream(store, into=into) as stream:
                async for name, _tensor in stream:
                    got.append(name)
                    if len(got) == 3:
                        limit.reschedule(asyncio.get_running_loop().time())
        assert got == ["layer.0", "layer.1", "layer.2"]
        assert not others()
        assert loader.budget.bytes_used == 0


async def test_wait_for_the_next_item_may_time_out_and_go_on(files, tensors):
    released = asyncio.Event()
    store = FaultyStore(MemoryStore(files), {1: Fault(hang=released)})
    async with make_loader().stream(store) as stream:
        assert (await anext(stream))[0] == "layer.0"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(stream), 0)
        released.set()
        assert [name async for name, _ in stream] == list(tensors)[1:]


async def test_a_failing_sibling_in_a_task_group_ends_the_load(files):
    loader = make_loader()
    store = GatedStore(MemoryStore(files))

    async def load():
        async with loader.stream(store) as stream:
            async for _ in stream:
                pass

    async def fail():
        await store.waiting(3)
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(load())
            group.create_task(fail())
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
    assert store.gates == []
    assert not others()
    assert loader.budget.bytes_used == 0


async def test_a_load_in_a_task_group_fails_with_its_own_error_bare(files):
    error = StoreError("broken")
    store = FaultyStore(MemoryStore(files), {2: Fault(error=error)})
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(make_loader().load_weights_async(store))
    assert list(caught.value.exceptions) == [error]


async def test_an_error_into_arrays_names_filled_and_torn_tensors(files, tensors, checkpoints):
    for is_drained in (True, False):
        store = FaultyStore(MemoryStore(files), {2: Fault(error=StoreError("broken"), after=100)})
        arrays = arrays_for(tensors)
        stream = make_loader(prefetch_count=1).stream(store, into=arrays)
        with pytest.raises(StoreError) as caught:
            if is_drained:
                await stream.drain()
            else:
                async with stream:
                    async for _ in stream:
                        pass
        assert caught.value.filled == ("layer.0", "layer.1")
        assert caught.value.torn == ("layer.2",)
        assert stream.progress() == (caught.value.filled, caught.value.torn)
        filled = caught.value.filled
        assert checkpoints.same({name: arrays[name] for name in filled}, {name: tensors[name] for name in filled})
        assert not arrays["layer.3"].any()


async def test_a_tensor_in_several_parts_is_torn_until_its_last(checkpoints):
    tensors = checkpoints.tensors(2, nbytes=SIZE * 4)
    files = checkpoints.rank_files(tensors)
    for number in range(8):
        store = FaultyStore(MemoryStore(files), {number: Fault(error=StoreError("broken"))})
        with pytest.raises(StoreError) as caught:
            await make_loader(prefetch_count=1).stream(store, into=arrays_for(tensors)).drain()
        assert caught.value.filled == ("layer.0",) * (number >= 4)
        assert caught.value.torn == ("layer.0" if number < 4 else "layer.1",)


def test_a_program_that_ends_with_a_stream_open_ends_quietly(files):
    loader = make_loader()
    for count in range(30):

        async def main(count=count):
            stream = loader.stream(MemoryStore(files))
            task = asyncio.ensure_future(anext(stream))
            await turns(count)
            return stream, task

        asyncio.run(main())
    assert loader.budget.bytes_used == 0


async def test_aclose_that_is_cancelled_still_closes(files):
    store = GatedStore(MemoryStore(files), is_stubborn=True)
    stream = await make_loader().stream(store)
    asked = asyncio.ensure_future(anext(stream))
    gates = await store.waiting(3)
    asked.cancel()
    await asyncio.wait([asked])
    closing = asyncio.ensure_future(stream.aclose())
    await turns(5)
    closing.cancel()
    await turns(5)
    assert not closing.done()
    for gate in gates:
        gate.open()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert not others()
