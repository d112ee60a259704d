import asyncio
import gc
import itertools
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future

import pytest

from asyncshard.tasks import yielding
from asyncshard.tasks.threads import DaemonThreads, wait_to_end
from asyncshard.tasks.yielding import yielding_gil


@pytest.fixture
def threads():
    threads = DaemonThreads(2, "asyncshard-test")
    yield threads
    threads.shutdown()


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


async def in_loop(event):
    """Wait for a threading.Event without a thread of ours."""
    await asyncio.to_thread(event.wait)


def test_no_thread_runs_before_the_first_call_and_no_more_than_asked_for_after_it(threads):
    before = threading.active_count()
    gate = threading.Event()
    assert threading.active_count() == before
    futures = [threads.submit(gate.wait) for _ in range(10)]
    assert threading.active_count() == before + 2
    gate.set()
    assert all(future.result() for future in futures)


def test_an_idle_thread_is_used_before_another_is_started(threads):
    names = set()
    for _ in range(20):
        names.add(threads.submit(lambda: threading.current_thread().name).result())
    assert len(names) <= 2
    assert all(name.startswith("asyncshard-test") for name in names)


def test_one_thread_runs_calls_in_the_order_of_submission():
    threads = DaemonThreads(1, "asyncshard-test")
    seen = []
    futures = [threads.submit(seen.append, number) for number in range(100)]
    futures[-1].result()
    threads.shutdown()
    assert seen == list(range(100))


async def test_results_and_errors_of_calls_reach_the_caller(threads):
    assert await threads.run(lambda one, two: one + two, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 / 0)


async def test_a_system_exit_in_a_thread_reaches_the_caller_and_ends_no_thread(threads):
    future = threads.submit(sys.exit, 3)
    with pytest.raises(SystemExit):
        future.result()
    assert await threads.run(lambda: 1) == 1


async def test_a_stop_iteration_in_a_thread_reaches_the_caller_as_a_runtime_error(threads):
    with pytest.raises(RuntimeError, match="StopIteration") as caught:
        await threads.run(next, iter(()))
    assert type(caught.value.__cause__) is StopIteration


async def test_a_cancelled_call_that_runs_is_waited_for_on_the_second_cancel_too(threads):
    started, gate, cancelled = threading.Event(), threading.Event(), []

    def work():
        started.set()
        gate.wait()

    task = asyncio.ensure_future(threads.run(work, on_cancel=lambda: cancelled.append(1)))
    await in_loop(started)
    for count in (1, 2, 3):
        task.cancel()
        await turns()
        assert not task.done()
        assert len(cancelled) == count
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_cancelled_call_that_has_not_begun_is_dropped_at_once():
    threads = DaemonThreads(1, "asyncshard-test")
    gate, ran = threading.Event(), []
    first = threads.submit(gate.wait)
    task = asyncio.ensure_future(threads.run(ran.append, 1))
    await turns(2)
    task.cancel()
    await turns()
    assert task.done()
    gate.set()
    first.result()
    await threads.aclose()
    assert ran == []


async def test_the_error_of_a_cancelled_call_is_not_reported(threads):
    started, gate = threading.Event(), threading.Event()

    def work():
        started.set()
        gate.wait()
        raise ValueError

    task = asyncio.ensure_future(threads.run(work))
    await in_loop(started)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    gc.collect()
    await turns()


async def test_an_idle_thread_keeps_nothing_of_its_last_call_alive(threads):
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing)
    assert await threads.run(lambda one: one, thing) is thing
    await threads.run(lambda: None)
    await threads.run(lambda: None)
    del thing
    gate = threading.Event()
    futures = [threads.submit(gate.wait) for _ in range(2)]  # both threads have gone on by now
    gate.set()
    for future in futures:
        future.result()
    assert reference() is None


def test_shut_threads_finish_what_is_queued_and_refuse_more():
    threads = DaemonThreads(1, "asyncshard-test")
    gate = threading.Event()
    futures = [threads.submit(gate.wait) for _ in range(3)]
    threads.shutdown(wait=False)
    gate.set()
    assert all(future.result() for future in futures)
    threads.shutdown()
    threads.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(print)


def test_a_call_that_hangs_does_not_hold_the_exit_of_the_interpreter():
    code = """
import threading
from asyncshard.tasks.threads import DaemonThreads
started = threading.Event()
def hang():
    started.set()
    threading.Event().wait()
DaemonThreads(1, "asyncshard-test").submit(hang)
started.wait()
print("ended")
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "ended\n"


def test_threads_serve_one_event_loop_after_another(threads):
    for _ in range(3):
        assert asyncio.run(threads.run(lambda: 7)) == 7


async def test_wait_to_end_raises_the_error_of_its_future():
    future = asyncio.get_running_loop().create_future()
    future.set_exception(KeyError("name"))
    with pytest.raises(KeyError):
        await wait_to_end(future)


async def test_wait_to_end_raises_at_once_when_its_future_is_cancelled():
    source = Future()
    task = asyncio.ensure_future(wait_to_end(asyncio.wrap_future(source)))
    await turns(2)
    source.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_that_runs_to_its_end_is_neither_dropped_nor_ended_sooner_by_a_cancel(monkeypatch):
    monkeypatch.setattr(yielding, "SLICE_S", 0)
    threads = DaemonThreads(1, "asyncshard-test")
    release = threading.Event()
    threads.submit(release.wait)
    reached = []
    call = asyncio.create_task(threads.run_to_end(lambda: reached.extend(yielding_gil(range(10)))))
    await turns(1)
    for _ in range(2):
        call.cancel()
        await turns()
    assert not call.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert reached == [*range(10)]
    await threads.aclose()


async def test_a_cancelled_call_that_yields_the_gil_ends_at_its_next_yield():
    begun = threading.Event()
    reached = []

    def endless():
        for number in yielding_gil(itertools.count()):
            begun.set()
            reached.append(number)

    threads = DaemonThreads(1, "asyncshard-test")
    call = asyncio.create_task(threads.run(endless))
    await asyncio.to_thread(begun.wait, 30)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    count = len(reached)
    assert await threads.run(lambda: [*yielding_gil(range(3))]) == [0, 1, 2]  # the next call is another one
    assert len(reached) == count
    await threads.aclose()
