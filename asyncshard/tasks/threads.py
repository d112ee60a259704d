"""Threads of our own for work that must not run on the event loop.

`concurrent.futures.ThreadPoolExecutor` is not used, because the interpreter joins its threads at exit: storage that
hangs would block the exit. The loop's default executor is not used, because the application may keep all its threads
busy.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class _Call(Future[T]):
    """The future of a call."""

    is_abandoned = False
    """Whether the caller that waited for the call was cancelled."""


_Job = tuple[_Call[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]

_running = threading.local()
"""The attribute ``call`` is the `_Call` that the current thread runs, or None between two calls."""


def raise_if_abandoned() -> None:
    """Raise CancelledError if this thread runs a call of `DaemonThreads.run` whose caller was cancelled."""
    call = getattr(_running, "call", None)
    if call is not None and call.is_abandoned:
        raise CancelledError("whoever waited for this call was cancelled")


class DaemonThreads(Executor):
    """An executor of at most `count` daemon threads, which begin the calls in the order of their submission.

    A thread is started when a call is submitted and no thread is idle. End the threads with `aclose`, or with
    `shutdown`, which blocks. The executor belongs to no event loop.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._is_shut = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> _Call[T]:
        """Queue a call, and return its future, which can be cancelled until a thread begins the call."""
        future: _Call[T] = _Call()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"the threads {self._name} have been shut down")
            self._jobs.put((future, fn, args, kwargs))
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._count:
                thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def _work(self) -> None:
        while (job := self._next_job()) is not None:
            future, fn, args, kwargs = job
            # This thread must drop every reference to the call before the caller learns that it has ended: otherwise
            # the memory that the caller then releases would still be in use.
            del job
            if future.set_running_or_notify_cancel():
                _running.call = future
                try:
                    result = fn(*args, **kwargs)
                except BaseException as error:
                    del fn, args, kwargs
                    future.set_exception(_for_future(error))
                    del error
                else:
                    del fn, args, kwargs
                    future.set_result(result)
                    del result
            else:
                del fn, args, kwargs
            _running.call = None
            del future

    def _next_job(self) -> _Job | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            with self._lock:
                self._idle += 1
            return self._jobs.get()

    async def run(self, fn: Callable[..., T], *args: Any, on_cancel: Callable[[], object] | None = None) -> T:
        """Run ``fn(*args)`` in a thread, and return its result.

        A cancellation drops the call if it has not begun. Otherwise the cancellation is raised only after the call has
        ended, even if `run` is cancelled again: a thread cannot be stopped, and the call may be writing into the
        caller's memory. A call that iterates by `yielding_gil` ends at its next yield. `on_cancel` is called on each
        cancellation, and may make the call end sooner.
        """
        job = self.submit(fn, *args)

        def stop() -> None:
            job.cancel()
            job.is_abandoned = True
            if on_cancel is not None:
                on_cancel()

        return await wait_to_end(asyncio.wrap_future(job), stop)

    async def run_to_end(self, fn: Callable[..., T], *args: Any) -> T:
        """Run ``fn(*args)`` in a thread, and return its result. A cancellation is raised only after the call has ended.

        It neither drops the call nor ends it sooner, in contrast to a cancellation of `run`.
        """
        return await wait_to_end(asyncio.wrap_future(self.submit(fn, *args)))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end after the calls that are queued, and wait for them if `wait`.

        `cancel_futures` has no effect: queued calls are always run.
        """
        with self._lock:
            if not self._is_shut:
                self._is_shut = True
                for _ in self._threads:
                    self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    async def aclose(self) -> None:
        """End the threads. Every call must have been awaited before, so that the threads only have to return."""
        self.shutdown(wait=True)


def _for_future(error: BaseException) -> BaseException:
    """Return the error for a future, to which StopIteration must not be set: in its place RuntimeError (PEP 479)."""
    if not isinstance(error, StopIteration):
        return error
    replaced = RuntimeError("a call in a thread raised StopIteration")
    replaced.__cause__ = error
    return replaced


async def wait_to_end(future: asyncio.Future[T], on_cancel: Callable[[], object] | None = None) -> T:
    """Return the result of `future`; a cancellation calls `on_cancel`, and is raised only after the future is done."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
            if on_cancel is not None:
                on_cancel()
    if cancelled is None:
        return future.result()
    if not future.cancelled():
        future.exception()  # marks it as retrieved: the caller gets the cancellation instead
    try:
        raise cancelled
    finally:
        del cancelled  # a reference cycle of exception and frame would keep the caller's buffers alive
