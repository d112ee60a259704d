"""Threads of our own for work that must not run on the event loop.

Not `concurrent.futures.ThreadPoolExecutor`: its threads are joined when the interpreter exits, so storage that hangs
would hold the exit. Not the loop's default executor: others fill it.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class DaemonThreads(Executor):
    """Run calls in at most `count` daemon threads, in the order of submission; a thread starts with the first call.

    Close it with `aclose` (or the blocking `shutdown`); it belongs to no event loop.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._is_shut = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue a call; its future can be cancelled until a thread has begun it."""
        future: Future[T] = Future()
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
            # Nothing of the call may stay alive through this thread, not even for the moment in which its caller learns
            # that it has ended: what a caller lets go of then would still be in use.
            del job
            if future.set_running_or_notify_cancel():
                try:
                    result = fn(*args, **kwargs)
                except BaseException as error:
                    del fn, args, kwargs
                    future.set_exception(error)
                    del error
                else:
                    del fn, args, kwargs
                    future.set_result(result)
                    del result
            else:
                del fn, args, kwargs
            del future

    def _next_job(self) -> _Job | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            with self._lock:
                self._idle += 1
            return self._jobs.get()

    async def run(self, fn: Callable[..., T], *args: Any, on_cancel: Callable[[], object] | None = None) -> T:
        """Run ``fn(*args)`` in a thread.

        When cancelled it drops a call that has not begun, and waits for one that has, on a second cancel too: a thread
        cannot be stopped, and what it works on may be the caller's. `on_cancel` may make the call end sooner.
        """
        job = self.submit(fn, *args)

        def stop() -> None:
            job.cancel()
            if on_cancel is not None:
                on_cancel()

        return await wait_to_end(asyncio.wrap_future(job), stop)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end after the calls that are queued."""
        with self._lock:
            if not self._is_shut:
                self._is_shut = True
                for _ in self._threads:
                    self._jobs.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    async def aclose(self) -> None:
        """End the threads. Every call has been awaited by now, so there is nothing to wait for but their return."""
        self.shutdown(wait=True)


async def wait_to_end(future: asyncio.Future[T], on_cancel: Callable[[], object] | None = None) -> T:
    """Wait for `future`; when cancelled, call `on_cancel`, still wait until the future is done, and only then raise."""
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
        future.exception()  # seen: the cancellation is what the caller hears of
    try:
        raise cancelled
    finally:
        del cancelled  # a cycle of exception and frame would keep the callers' buffers alive
