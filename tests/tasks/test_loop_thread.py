"""An event loop in a thread of its own."""

import asyncio
import threading

import pytest

from asyncshard.tasks.loop_thread import LoopThread


@pytest.fixture
async def loop_thread():
    loop_thread = LoopThread("asyncshard-test")
    yield loop_thread
    await loop_thread.aclose()


async def test_a_coroutine_runs_in_the_other_thread_and_its_result_comes_back(loop_thread):
    async def where():
        return threading.current_thread().name, asyncio.get_running_loop()

    name, loop = await loop_thread.run(where)
    assert name == "asyncshard-test"
    assert loop is not asyncio.get_running_loop()
    assert await loop_thread.run(where) == (name, loop)


async def test_the_error_of_a_coroutine_is_raised_to_the_caller(loop_thread):
    async def fail():
        raise LookupError("here")

    with pytest.raises(LookupError, match="here"):
        await loop_thread.run(fail)


async def test_a_cancelled_call_returns_when_its_coroutine_has_ended(loop_thread):
    begun, ended = threading.Event(), threading.Event()

    async def work():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.set()

    call = asyncio.ensure_future(loop_thread.run(work))
    await asyncio.to_thread(begun.wait)
    call.cancel()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert ended.is_set()


async def test_a_call_may_be_cancelled_before_it_has_begun(loop_thread):
    async def work():
        await asyncio.Event().wait()

    call = asyncio.ensure_future(loop_thread.run(work))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_closing_ends_the_remaining_coroutines_and_refuses_new_ones(loop_thread):
    begun = threading.Event()

    async def work():
        begun.set()
        await asyncio.Event().wait()

    call = asyncio.ensure_future(loop_thread.run(work))
    await asyncio.to_thread(begun.wait)
    await loop_thread.aclose()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(RuntimeError, match="closed"):
        await loop_thread.run(work)
    await loop_thread.aclose()


async def test_closing_an_unused_loop_thread_starts_no_thread():
    loop_thread = LoopThread("asyncshard-test")
    await loop_thread.aclose()
    assert "asyncshard-test" not in {thread.name for thread in threading.enumerate()}
