"""An update: the changed tensors of a checkpoint, which are iterated over, or applied to the live weights at once."""

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
"""An update is copied by at most 2 threads, which saturate the memory bandwidth of most machines."""
_TWO_THREADS_BYTES = 32 << 20
"""An update of 32 MiB or more is copied by 2 threads: the copy takes much longer than the start of a thread."""


class Update:
    """The tensors of a checkpoint that differ from the loaded ones. ``await loader.prepare_refresh(...)`` returns it.

    The tensors are read, checked against their digests, and staged in memory of the budget; the live weights are
    unchanged. ``async for name, tensor in update`` yields views of that memory in plan order. It may be repeated until
    `apply` copies the tensors into the state dict. The memory goes back to the budget after `apply`, at the end of
    ``async with update``, at `aclose`, or when the object is dropped. Views that are alive by then count as held.

    With ``stage=False`` the tensors are in the state dict already, and iterating yields ``(name, destination)``.
    """

    def __init__(
        self,
        version: CheckpointVersion,
        changes: ChangedTensors,
        changed: tuple[str, ...],
        account: Account | None,
        bytes_read: int,
        *,
        is_staged: bool,
    ) -> None:
        self._version = version
        self._changed = changed
        self._bytes_read = bytes_read
        self._changes: ChangedTensors | None = changes
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
        """The version of the checkpoint that was read. After `apply` it is the version of the weights."""
        return self._version

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the tensors that were read, in plan order."""
        return self._changed

    @property
    def bytes_read(self) -> int:
        """The bytes of tensor data that were read, without headers."""
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
        """Copy all tensors into the state dict, in threads, and give the memory back. Iterating is an error afterwards.

        A cancel does not interrupt it: it finishes, and then raises. Sinks are written before arrays. The memory of a
        destination may have moved since `prepare_refresh`, if its shape and dtype are unchanged. With ``stage=False``
        it does nothing.

        Raises
        ------
        RuntimeError
            The update has been applied before.
        StreamClosedError
            The update has been closed.
        DestinationError
            A destination no longer fits its tensor; nothing was written.
        Exception
            The error of a sink. Its attributes ``filled`` and ``torn`` name the destinations that are complete, and the
            one that is partly written.
        """
        if self._is_applied:
            raise RuntimeError("the update has been applied; prepare another one for later changes")
        changes = self._open_changes()
        self._is_applied = True
        if not self._is_staged:
            return
        self._changes = None  # a thread gives the memory back: from now on nobody gets a view of it
        self._applying = asyncio.ensure_future(self._apply(changes))
        del changes
        try:
            await wait_to_end(self._applying)
        finally:
            self._applying = None

    async def aclose(self) -> None:
        """Give the memory back. If `apply` is running, wait for its end first.

        Any task may call it, any number of times.
        """
        if self._applying is not None:
            await asyncio.wait([self._applying])
        account = self._let_go()
        if account is not None:
            await account.aclose()

    def _open_changes(self) -> ChangedTensors:
        if self._changes is None:
            raise StreamClosedError("the update has been applied or closed; prepare another one")
        return self._changes

    async def _apply(self, changes: ChangedTensors) -> None:
        threads = DaemonThreads(_COPYING_THREADS, "asyncshard-apply")
        count = _COPYING_THREADS if self._bytes_read >= _TWO_THREADS_BYTES else 1
        copier = _Copier(changes, threads, count, self._release)
        try:
            sinks = await threads.run(copier.find_and_copy, is_abandonable=False)
            if sinks:
                await _write_sinks(changes, sinks)
                await threads.run(copier.copy, is_abandonable=False)
        except BaseException:
            await threads.run(copier.end, is_abandonable=False)
            raise
        finally:
            await threads.aclose()

    def _release(self) -> None:
        """Give the memory back to the budget, and unused pages to the system. Call it in a thread."""
        account = self._let_go()
        if account is not None:
            account.close()
            account.budget.trim()

    def _let_go(self) -> Account | None:
        """Drop the memory; return its account, which the caller closes."""
        changes, self._changes = self._changes, None
        account, self._account = self._account, None
        if changes is not None:
            changes.lease = None
        if self._finalizer is not None:
            self._finalizer.detach()
        return account


class _Tensors:
    """The iterator over an update. It keeps no memory alive."""

    def __init__(self, update: Update) -> None:
        self._update = update
        self._tensors = update._open_changes().tensors()
        self._pace = LoopYield()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        if self._pace.is_due():
            await self._pace.give_way()
        changes = self._update._open_changes()
        for tensor in self._tensors:
            return tensor.name, changes.view(tensor) if self._update._is_staged else tensor.target
        raise StopAsyncIteration


class _Copier:
    """Copies changed tensors to their destinations. Every method must be called in a thread."""

    def __init__(
        self, changes: ChangedTensors, threads: DaemonThreads, count: int, release: Callable[[], None]
    ) -> None:
        self._changes = changes
        self._threads = threads
        self._jobs = [CopyJob() for _ in range(count)]
        self._release = release

    def find_and_copy(self) -> list[ChangedTensor]:
        """Find all destinations. If some are sinks, return their tensors; otherwise `copy`, and return no tensors."""
        sinks = self._changes.add_copies(self._jobs)
        if not sinks:
            self.copy()
        return sinks

    def copy(self) -> None:
        """Run the first job here and the others in further threads, then `end`."""
        others = [self._threads.submit(job.run) for job in self._jobs[1:] if job.nbytes]
        try:
            self._jobs[0].run()
        finally:
            for other in others:
                other.result()
        self.end()

    def end(self) -> None:
        """Drop all jobs, and give the memory back. A second call does nothing."""
        for job in self._jobs:  # an error refers to their frames, which would keep the memory alive
            job.clear()
        self._changes.lease = None
        self._release()


async def _write_sinks(changes: ChangedTensors, tensors: list[ChangedTensor]) -> None:
    filled: list[str] = []
    for tensor in tensors:
        try:
            for start in range(0, tensor.nbytes, changes.chunk_size):
                stop = min(start + changes.chunk_size, tensor.nbytes)
                await tensor.target.write(start, changes.bytes_of(tensor, start, stop))
        except BaseException as error:
            error.filled, error.torn = tuple(filled), (tensor.name,)  # type: ignore[attr-defined]
            raise
        filled.append(tensor.name)
