import asyncio
import gc
import weakref

import pytest

from asyncshard.tasks.bounded import run_bounded

BOTH = pytest.mark.parametrize("on_failure", ["finish", "cancel"])


class Job:
    """A coroutine that runs until it is let go, and notes how it ended."""

    def __init__(self):
        self.state = "waits"
        self.may_end = asyncio.Event()
        self.may_end_cancel = asyncio.Event()
        self.may_end_cancel.set()
        self.error = None

    async def run(self):
        self.state = "runs"
        try:
            await self.may_end.wait()
            if self.error is not None:
                raise self.error
        except asyncio.CancelledError:
            self.state = "ends"
            await self.may_end_cancel.wait()
            self.state = "cancelled"
            raise
        except Exception:
            self.state = "failed"
            raise
        self.state = "ended"
        return self

    def end(self, error=None):
        self.error = error
        self.may_end.set()


async def turns(count=20):
    for _ in range(count):
        await asyncio.sleep(0)


def begin(count, jobs, on_failure):
    return asyncio.ensure_future(run_bounded(count, (job.run() for job in jobs), on_failure=on_failure))


def states(jobs):
    return [job.state for job in jobs]


@BOTH
async def test_jobs_begin_in_order_and_no_more_than_the_count_run_at_once(on_failure):
    jobs = [Job() for _ in range(5)]
    running = begin(2, jobs, on_failure)
    await turns()
    assert states(jobs) == ["runs", "runs", "waits", "waits", "waits"]
    jobs[1].end()
    await turns()
    assert states(jobs) == ["runs", "ended", "runs", "waits", "waits"]
    for job in jobs:
        job.end()
    assert await running == jobs


@BOTH
async def test_results_are_in_the_order_of_the_jobs_and_not_of_their_ends(on_failure):
    jobs = [Job() for _ in range(3)]
    running = begin(3, jobs, on_failure)
    for job in reversed(jobs):
        await turns()
        job.end()
    assert await running == jobs


@BOTH
@pytest.mark.parametrize("count", [0, 1, 4])
async def test_no_jobs_have_no_results(on_failure, count):
    assert await run_bounded(count, iter(()), on_failure=on_failure) == []


async def test_after_a_failure_jobs_that_run_end_and_no_other_is_begun():
    jobs = [Job() for _ in range(4)]
    running = begin(2, jobs, "finish")
    await turns()
    jobs[0].end(ValueError("first"))
    await turns()
    assert not running.done()
    assert states(jobs) == ["failed", "runs", "waits", "waits"]
    jobs[1].end()
    with pytest.raises(ValueError, match="first"):
        await running
    assert states(jobs) == ["failed", "ended", "waits", "waits"]


async def test_of_several_failures_that_of_the_job_begun_first_is_raised():
    jobs = [Job() for _ in range(3)]
    running = begin(3, jobs, "finish")
    for number in (2, 0, 1):
        await turns()
        jobs[number].end(ValueError(f"number {number}"))
    with pytest.raises(ValueError, match="number 0"):
        await running


async def test_a_failure_cancels_the_jobs_that_run_once_and_waits_for_their_end():
    jobs = [Job() for _ in range(4)]
    running = begin(3, jobs, "cancel")
    await turns()
    jobs[0].may_end_cancel.clear()
    jobs[1].end(ValueError("number 1"))
    await turns()
    assert states(jobs) == ["ends", "failed", "cancelled", "waits"]
    assert not running.done()
    jobs[0].may_end_cancel.set()
    with pytest.raises(ValueError, match="number 1"):
        await running
    assert states(jobs) == ["cancelled", "failed", "cancelled", "waits"]


async def test_a_job_that_fails_when_it_is_cancelled_does_not_hide_the_first_failure():
    async def fails_late():
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("late")

    failing = Job()
    running = asyncio.ensure_future(run_bounded(2, (job() for job in (fails_late, failing.run)), on_failure="cancel"))
    await turns()
    failing.end(ValueError("early"))
    with pytest.raises(ValueError, match="early"):
        await running


@BOTH
async def test_a_cancel_reaches_the_jobs_that_run_and_waits_for_their_end_on_a_second_cancel_too(on_failure):
    jobs = [Job() for _ in range(3)]
    running = begin(2, jobs, on_failure)
    await turns()
    jobs[0].may_end_cancel.clear()
    for _ in range(2):
        running.cancel()
        await turns()
        assert states(jobs) == ["ends", "cancelled", "waits"]
        assert not running.done()
    jobs[0].may_end_cancel.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert states(jobs) == ["cancelled", "cancelled", "waits"]


@BOTH
async def test_a_job_that_is_cancelled_by_others_counts_as_a_failure(on_failure):
    future = asyncio.get_running_loop().create_future()

    async def wait():
        await future

    other = Job()
    running = asyncio.ensure_future(run_bounded(1, (job() for job in (wait, other.run)), on_failure=on_failure))
    await turns()
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert other.state == "waits"


@BOTH
async def test_an_error_of_the_iterator_is_raised_after_the_jobs_that_run(on_failure):
    job = Job()

    def make():
        yield job.run()
        raise KeyError("made wrong")

    running = asyncio.ensure_future(run_bounded(2, make(), on_failure=on_failure))
    await turns()
    job.end()
    with pytest.raises(KeyError, match="made wrong"):
        await running
    assert job.state == {"finish": "ended", "cancel": "cancelled"}[on_failure]


@BOTH
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_the_memory_of_jobs_is_free_at_once_after_an_error(on_failure, is_cancelled):
    class Memory:
        pass

    memory = Memory()
    is_gone = weakref.ref(memory)
    gate = asyncio.Event()

    async def use(held):
        await gate.wait()
        raise ValueError(str(held))

    running = asyncio.ensure_future(run_bounded(2, (use(held) for held in [memory] * 2), on_failure=on_failure))
    await turns()
    del memory
    gc.disable()
    try:
        if is_cancelled:
            running.cancel()
        gate.set()
        await asyncio.wait([running])
        assert running.cancelled() if is_cancelled else isinstance(running.exception(), ValueError)
        del running
        await turns()
        assert is_gone() is None
    finally:
        gc.enable()
