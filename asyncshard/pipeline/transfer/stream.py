"""The stream: one object that is awaitable, an async context manager and an async iterator. The consumer holds it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from asyncshard.errors import StreamClosedError, UnsupportedTensorError
from asyncshard.events import Delivered
from asyncshard.format.header import TensorInfo
from asyncshard.pipeline.checkpoint.checkpoint import CheckpointInfo
from asyncshard.pipeline.checkpoint.load_plan import LoadPlan
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.pipeline.transfer.load import Delivery, Load
from asyncshard.pipeline.transfer.statistics import NOT_STARTED, Statistics
from asyncshard.pipeline.transfer.supervisor import State, Supervisor
from asyncshard.pipeline.transfer.transfer import Transfer
from asyncshard.tasks.yielding import LoopYield


class Stream:
    """An asynchronous iterator over the tensors of a checkpoint, as they are read.

    ``await stream`` and ``async with stream`` open it: they list the shards, validate every header, plan the reads, and
    check the plan against the budget. Every error that can be found before tensor data is read is raised there. A bare
    ``async for`` opens the stream, too. Iterating reads tensor data, at most `prefetch_count` read items ahead of the
    consumer, and yields ``(name, tensor)`` in plan order: shards by part, tensors by file offset.

    A delivered tensor belongs to the consumer. Its bytes return to the memory budget when its last view dies.

    The end of the ``async with``, or `aclose`, stops the reads and waits for them; no task or thread is left.
    A stream that is dropped without either is closed soon after. A cancelled ``__anext__`` loses no item. A stream has
    one consumer at a time.
    """

    def __init__(self, load: Load, delivery: Delivery) -> None:
        self._load = load
        self._delivery: Delivery | None = delivery
        self._supervisor: Supervisor | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._batch: Iterator[tuple[str, Any, int]] = iter(())
        self._pace = LoopYield()
        self._delivered = self._delivered_bytes = 0
        """The number of tensors that the consumer has taken and that no event has reported yet, and their bytes."""
        self._is_asking = False
        self._is_closed = False
        self._is_at_end = False

    def __repr__(self) -> str:
        done = self.statistics()
        url = self._load.url
        state = self._state()
        if not self.is_open:
            return f"<Stream {url!r} {state}>"
        return (
            f"<Stream {url!r} {state}, {done.tensors_done:,} of {done.tensors_total:,} tensors, "
            f"{done.bytes_done / 1e9:.1f} of {done.bytes_total / 1e9:.1f} GB>"
        )

    def _state(self) -> str:
        if self._supervisor is not None:
            return self._supervisor.state.value
        return State.CLOSED.value if self._is_closed else "not open yet"

    def __await__(self) -> Generator[Any, None, Self]:
        return self._open().__await__()

    async def __aenter__(self) -> Self:
        return await self._open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
        if exc is not None:
            self._tell_progress(exc)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        if self._is_asking:
            raise RuntimeError("another task is already waiting for the next tensor of this stream")
        self._is_asking = True
        try:
            if self._pace.is_due():
                await self._pace.give_way()
            while True:
                for name, tensor, nbytes in self._batch:
                    self._delivered += 1
                    self._delivered_bytes += nbytes
                    return name, tensor
                if not await self._next_batch():
                    raise StopAsyncIteration
        except asyncio.CancelledError as error:
            await self._halt(error)
            raise
        except UnsupportedTensorError:
            await self.aclose()
            raise
        finally:
            self._is_asking = False

    async def aclose(self) -> None:
        """Stop the reads, wait for them, and release everything. Any task may call it, any number of times."""
        self._is_closed = True
        self._report_delivered()
        self._batch = iter(())
        if self._supervisor is not None:
            await self._supervisor.aclose()
            self._forget()

    async def drain(self) -> Statistics:
        """Iterate to the end and drop what is delivered; for streams into destinations. An error closes the stream."""
        try:
            async for delivered in self:
                del delivered  # otherwise the last tensor would count as held
        except BaseException as error:
            await self.aclose()
            self._tell_progress(error)
            raise
        return self.statistics()

    @property
    def is_open(self) -> bool:
        """Whether the stream has been opened. It stays true after the end."""
        return self._supervisor is not None and self._supervisor.transfer is not None

    @property
    def info(self) -> Mapping[str, TensorInfo]:
        """The dtype and the shape of each tensor in the file, and its byte range there, by name.

        For sliced tensors these are the rank's shape, and the byte range within the rank's virtual file.
        """
        return CheckpointInfo(self._transfer().checkpoint)

    @property
    def plan(self) -> LoadPlan:
        """The plan of the load: how many bytes are read of which files."""
        transfer = self._transfer()
        return LoadPlan.of(transfer.checkpoint, transfer.pacing.max_gap_bytes)

    @property
    def version(self) -> CheckpointVersion:
        """The version of the checkpoint when the stream was opened. At the end, it is the version of the weights."""
        return self._transfer().version

    @property
    def ties(self) -> Mapping[str, str]:
        """Other names of tensors, each with the stored one: ``{"lm_head.weight": "model.embed_tokens.weight"}``.

        The files' metadata tells them, or ``config.json``. The stream delivers the tensors under their stored names.
        """
        return self._transfer().ties

    def statistics(self) -> Statistics:
        """Return a snapshot of the stream's progress. It may be called at any time; before opening, all is zero."""
        supervisor = self._supervisor
        if supervisor is None:
            return NOT_STARTED
        self._report_delivered()
        account = supervisor.account
        return supervisor.counters.statistics(bytes_held=account.bytes_held(), budget_wait_s=account.wait_s)

    @property
    def narrowed(self) -> tuple[str, ...]:
        """Names of destinations that are larger than their tensor, which filled their first corner."""
        return self._transfer().narrowed

    def progress(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the destinations that are complete, and of those that are partly written."""
        return self._transfer().progress()

    async def _open(self) -> Self:
        supervisor = self._started()  # nothing is open if this fails: the next call raises the same error
        try:
            await supervisor.opened()
        except BaseException:
            await self.aclose()
            raise
        return self

    def _started(self) -> Supervisor:
        if self._supervisor is None:
            if self._is_closed:
                raise StreamClosedError("the stream has been closed")
            assert self._delivery is not None
            self._supervisor = Supervisor(self._load, self._delivery)
            self._delivery = None  # it refers to the caller's destinations: the transfer alone keeps them alive
            self._finalizer = weakref.finalize(self, self._supervisor.abandon)
            self._finalizer.atexit = False
        self._require_loop(self._supervisor)
        return self._supervisor

    async def _next_batch(self) -> bool:
        """Go on to the next item; return False at the end."""
        self._report_delivered()
        if self._is_at_end:
            return False
        if self._is_closed:
            raise StreamClosedError("the stream has been closed")
        supervisor = self._started()
        try:
            await supervisor.opened()
        except Exception:  # a cancel does not close the stream: the next call waits on
            await self.aclose()
            raise
        self._batch = iter(())  # the finished batch would keep its item's buffer alive
        slot = await supervisor.next_slot()
        if slot is None:
            self._is_at_end = True
            await supervisor.join()
            self._forget()
            return False
        if slot.error is not None:
            await self.aclose()
            self._tell_progress(slot.error)
            try:
                raise slot.error
            finally:
                del slot  # a reference cycle of exception and frame would keep the buffers of the read alive
        assert slot.item is not None
        self._batch = self._transfer().deliver(slot.item, slot.lease)
        return True

    def _report_delivered(self) -> None:
        """Report the tensors that the consumer has taken since the last report, in one event, which costs less."""
        if self._delivered and self._supervisor is not None:
            self._supervisor.report(Delivered(self._delivered, self._delivered_bytes))
            self._delivered = self._delivered_bytes = 0

    async def _halt(self, error: asyncio.CancelledError) -> None:
        """Stop the reads if they write into the caller's memory: a cancelled caller must not go on before they stop."""
        supervisor = self._supervisor
        if supervisor is not None and supervisor.transfer is not None and supervisor.transfer.is_in_place:
            await supervisor.halt()
            self._tell_progress(error)

    def _tell_progress(self, error: BaseException) -> None:
        """Set on an error ``filled`` and ``torn``: the destinations that are complete, and those partly written."""
        if self._supervisor is None or self._supervisor.transfer is None or not self._supervisor.transfer.is_in_place:
            return
        filled, torn = self._supervisor.transfer.progress()
        error.filled, error.torn = filled, torn  # type: ignore[attr-defined]

    def _forget(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()

    def _transfer(self) -> Transfer:
        if self._supervisor is None or self._supervisor.transfer is None:
            raise RuntimeError("the stream is not open: await it, or enter it with `async with`, first")
        return self._supervisor.transfer

    @staticmethod
    def _require_loop(supervisor: Supervisor) -> None:
        if supervisor.loop is not asyncio.get_running_loop():
            raise RuntimeError("the stream belongs to another event loop")
