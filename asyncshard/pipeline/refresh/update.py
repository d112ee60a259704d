"""What has changed in a checkpoint, read and waiting: to be iterated over, or applied to the live weights at once."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from asyncshard.errors import StreamClosedError
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.pipeline.memory.budget import Account
from asyncshard.pipeline.refresh.changes import ChangedTensor, ChangedTensors, CopyJob
from asyncshard.tasks.threads import DaemonThreads, wait_to_end
from asyncshard.tasks.yielding import LoopYield

_COPYING_THREADS = 2
"""As many saturate memory bandwidth on most machines."""
_TWO_THREADS_BYTES = 32 << 20
"""So many take much more time to copy than a further thread takes to start."""


class Update:
    """The tensors of a checkpoint that differ from those loaded. Made by ``await loader.prepare_refresh(...)``.

    They are read, checked, and in memory of the budget; nothing live has been touched. ``async for name, tensor in
    update`` gives views of that memory, in plan order, as often as is asked, until `apply` copies them into the state
    dict. The memory goes back to the budget after that, at the end of ``async with update``, at `aclose`, or when the
    object is dropped; views that are still alive then count as held.

    With ``stage=False`` they are in the state dict already: iterating yields ``(name, destination)``.
    """

    def __init__(
        self,
        version: CheckpointVersion,
        contents: ChangedTensors,
        changed: tuple[str, ...],
        account: Account | None,
        bytes_read: int,
        *,
        is_staged: bool,
    ) -> None:
        self._version = version
        self._changed = changed
        self._bytes_read = bytes_read
        self._contents: ChangedTensors | None = contents
        self._account = account
        self._is_staged = is_staged
        self._is_applied = False
        self._applying: asyncio.Task[None] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        if account is not None:
            self._finalizer = weakref.finalize(self, account.budget.abandon, account)
            self._finalizer.atexit = False

    @property
    def version(self) -> CheckpointVersion:
        """What the checkpoint was when it was read: that of the weights once the update has been applied."""
        return self._version

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that were read, in plan order."""
        return self._changed

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data that were read; headers are not counted."""
        return self._bytes_read

    def __repr__(self) -> str:
        return f"<Update of {len(self._changed)} tensors, {self._bytes_read} bytes>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        return _Tensors(self)

    async def apply(self) -> None:
        """Copy everything into the state dict, in threads, and give the memory back: from now on nobody iterates.

        It cannot be interrupted half way: when cancelled it finishes, and then raises. Sinks are written to first.
        Tensors may have got other memory since `prepare_refresh`, of the same shape and dtype. After ``stage=False``
        there is nothing left to do.

        Raises
        ------
        RuntimeError
            It has been applied before.
        StreamClosedError
            It has been closed.
        DestinationError
            A destination does not fit any more; nothing was written.
        Exception
            What a sink raised; ``filled`` and ``torn`` say which destinations are whole and which partly written.
        """
        if self._is_applied:
            raise RuntimeError("the update has been applied; prepare another one for later changes")
        contents = self._open_contents()
        self._is_applied = True
        if not self._is_staged:
            return
        self._contents = None  # its memory goes back in a thread: no more views of it
        self._applying = asyncio.ensure_future(self._apply(contents))
        del contents
        try:
            await wait_to_end(self._applying)
        finally:
            self._applying = None

    async def aclose(self) -> None:
        """Give the memory back, after an `apply` that is running. From any task, any number of times."""
        if self._applying is not None:
            await asyncio.wait([self._applying])
        account = self._let_go()
        if account is not None:
            await account.aclose()

    def _open_contents(self) -> ChangedTensors:
        if self._contents is None:
            raise StreamClosedError("the update has been applied or closed; prepare another one")
        return self._contents

    async def _apply(self, contents: ChangedTensors) -> None:
        threads = DaemonThreads(_COPYING_THREADS, "asyncshard-apply")
        count = _COPYING_THREADS if self._bytes_read >= _TWO_THREADS_BYTES else 1
        copying = _Copying(contents, threads, count, self._release)
        try:
            sinks = await threads.run(copying.find_and_copy)
            if sinks:
                await _write_sinks(contents, sinks)
                await threads.run(copying.copy)
        except BaseException:
            await threads.run(copying.end)
            raise
        finally:
            await threads.aclose()

    def _release(self) -> None:
        """Give the memory back, unused pages to the system; for a thread."""
        account = self._let_go()
        if account is not None:
            account.close()
            account.budget.trim()

    def _let_go(self) -> Account | None:
        """Let go of the memory; return the account, which the caller closes."""
        contents, self._contents = self._contents, None
        account, self._account = self._account, None
        if contents is not None:
            contents.lease = None
        if self._finalizer is not None:
            self._finalizer.detach()
        return account


class _Tensors:
    """The iterator of an update; it keeps no memory alive."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._rows = update._open_contents().rows()
        self._pace = LoopYield()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        if self._pace.is_due():
            await self._pace.give_way()
        contents = self._update._open_contents()
        for row in self._rows:
            return row.name, contents.view(row) if self._update._is_staged else row.target
        raise StopAsyncIteration


class _Copying:
    """Copies what has changed to where it goes. Every method is for a thread."""

    def __init__(
        self, contents: ChangedTensors, threads: DaemonThreads, count: int, release: Callable[[], None]
    ) -> None:
        self.contents = contents
        self._threads = threads
        self._shares = [CopyJob() for _ in range(count)]
        self._release = release

    def find_and_copy(self) -> list[ChangedTensor]:
        """Find all destinations, then copy and `end`; where some are sinks return these, and copy nothing yet."""
        sinks = self.contents.share(self._shares)
        if not sinks:
            self.copy()
        return sinks

    def copy(self) -> None:
        """Copy the first share here, and the others in further threads; then `end`."""
        others = [self._threads.submit(share.run) for share in self._shares[1:] if share.nbytes]
        try:
            self._shares[0].run()
        finally:
            for other in others:
                other.result()
        self.end()

    def end(self) -> None:
        """Forget everything, and give the memory back; once more does nothing."""
        for share in self._shares:  # an error refers to their frames, and would keep the memory alive
            share.clear()
        self.contents.lease = None
        self._release()


async def _write_sinks(contents: ChangedTensors, rows: list[ChangedTensor]) -> None:
    filled: list[str] = []
    for row in rows:
        try:
            for start in range(0, row.nbytes, contents.chunk_size):
                stop = min(start + contents.chunk_size, row.nbytes)
                await row.target.write(start, contents.bytes_of(row, start, stop))
        except BaseException as error:
            error.filled, error.torn = tuple(filled), (row.name,)  # type: ignore[attr-defined]
            raise
        filled.append(row.name)
