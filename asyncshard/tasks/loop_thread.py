"""An event loop in a thread of its own, for data that arrives at full speed and for calls that block for a while.

Receiving 3 GB/s on the application's loop makes that loop late by milliseconds. When the data is received on a loop in
another thread, only the message "this read is done" reaches the application's loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from asyncshard.tasks.threads import wait_to_end

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread. The thread starts with the first coroutine; `aclose` ends it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ended: Future[None] = Future()
        self._is_closed = False

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run the coroutine that `make` returns on the thread's loop, and return its result.

        It may be awaited on any event loop. A cancellation cancels the coroutine too, and is raised only after the
        coroutine has ended, even if `run` is cancelled again: the coroutine may be writing into the caller's memory.
        """
        loop = self._started()
        done: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            task = loop.create_task(make())
            tasks.append(task)
            task.add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            tasks.clear()
            if task.cancelled():
                done.cancel()
            elif (error := task.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(task.result())

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        loop.call_soon_threadsafe(begin)
        return await wait_to_end(asyncio.wrap_future(done), lambda: loop.call_soon_threadsafe(cancel))

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"the thread {self._name} has been closed")
            if self._loop is None:
                self._loop = uvloop.new_event_loop()
                self._thread = threading.Thread(target=self._serve, args=(self._loop,), name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            left = asyncio.all_tasks(loop)  # empty, unless a caller of `aclose` broke its contract
            for task in left:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()
            self._ended.set_result(None)

    async def aclose(self) -> None:
        """Stop the loop and end the thread. Every call of `run` must have been awaited before."""
        with self._lock:
            self._is_closed = True
            loop, thread = self._loop, self._thread
            self._loop = None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            await wait_to_end(asyncio.wrap_future(self._ended))
            thread.join()  # it has nothing left to do but return
