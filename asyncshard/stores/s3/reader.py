"""Reads of one bucket: pinned to an ETag, retried, resumed where a body was cut, compared with checksums."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from asyncshard.errors import ChecksumError, StoreError, StoreTimeoutError
from asyncshard.events import Listener, Retried
from asyncshard.stores.http.exchange import Receive
from asyncshard.stores.http.failures import REMEDIES, Action, Failed, Failure
from asyncshard.stores.http.response import Pin, RangeRequest, ResponseHead, require_range
from asyncshard.stores.http.retries import Retries, RetryPolicy
from asyncshard.stores.s3.client import S3Client
from asyncshard.stores.s3.errors import failure_of_response, is_error
from asyncshard.stores.s3.transports import Transport
from asyncshard.stores.scatter import Scatter

if TYPE_CHECKING:
    from asyncshard.stores.s3.integrity import Integrity  # it imports a package that only checksums need

T = TypeVar("T")
_CORRUPTED = Failure(
    "these bytes came differently when they were read again, and the first time they did not match the object's "
    "checksum: something on the way changes them; load it again",
    action=Action.RETRY,
    kind=ChecksumError,
)
_UNMATCHED = "what was read does not match the checksum that the server has of the object"
_MISMATCH = Failure(
    "what was read, and read again, does not match the checksum that the server has of the object: upload it anew",
    kind=ChecksumError,
)


class Target(NamedTuple):
    """The object, or byte range, that a request is about, for its error."""

    bucket: str
    key: str
    """Key of the object, or prefix of a listing."""
    start: int | None = None
    """First byte of the range; None where the request has none."""
    stop: int | None = None
    """The byte behind the last one of the range."""

    @property
    def path(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def error(self, failure: Failure, attempts: int) -> StoreError:
        """Return the error that the user gets."""
        facts = [] if self.start is None or self.stop is None else [f"bytes {self.start:,}-{self.stop:,}"]
        facts += [f"{attempts} attempts"] if attempts > 1 else []
        facts += [f"request id {failure.request_id}"] if failure.request_id else []
        error = failure.kind(
            f"{self.path}: {failure.reason}" + (f" ({', '.join(facts)})" if facts else ""),
            path=self.path,
            start=self.start,
            stop=self.stop,
        )
        error.bucket, error.key = self.bucket, self.key
        error.status, error.request_id, error.attempts = failure.status, failure.request_id, attempts
        error.retryable = failure.is_retryable
        return error


class S3Reader:
    """All requests of a store to its server. It runs on the store's own loop.

    Parameters
    ----------
    client : S3Client
    make_transport : callable
        Called once, after the client has been started.
    bucket : str
    policy : RetryPolicy
    report : Listener
        Called with each request that is made again.
    max_workers : int
        Range requests in flight at most. The deadline of a request begins when it gets its turn.
    integrity : Integrity or None
        Compares checksums; None where that was not asked for.
    """

    def __init__(
        self,
        client: S3Client,
        make_transport: Callable[[], Transport],
        bucket: str,
        policy: RetryPolicy,
        report: Listener,
        *,
        max_workers: int,
        integrity: Integrity | None,
    ) -> None:
        self._client = client
        self._make_transport = make_transport
        self._transport: Transport | None = None
        self._bucket = bucket
        self._policy = policy
        self._turns = asyncio.Semaphore(max_workers)
        self._report = report
        self._integrity = integrity

    async def aclose(self) -> None:
        try:
            if self._transport is not None:
                await self._transport.aclose()
        finally:
            await self._client.aclose()
            if self._integrity is not None:
                await self._integrity.aclose()

    async def list_names(self, prefix: str) -> list[str]:
        """Return the names of all objects directly below a prefix."""
        names: list[str] = []
        token: str | None = None
        target = Target(self._bucket, prefix)
        while True:
            page, token = await self._persist(target, partial(self._client.list_page, prefix, token))
            names += page
            if token is None:
                return names

    async def head(self, key: str) -> Pin:
        """Ask for an object's ETag and size."""
        pin, _ = await self._persist(Target(self._bucket, key), lambda: self._client.head(key))
        return pin

    async def open(self, key: str, nbytes: int) -> tuple[Pin, bytes]:
        """Pin an object and read its first `nbytes` bytes, or all of a shorter one."""
        request = RangeRequest(0, max(nbytes, 1), None)
        target = Target(self._bucket, key, 0, request.stop)
        memory = memoryview(bytearray(request.stop))
        async with self._turns:
            pin, length = await self._persist(target, lambda: self._open(key, request, memory))
        if length == 0:
            return await self.head(key), b""
        first = bytes(memory[: min(length, nbytes)])
        if self._integrity is not None:
            _, headers = await self._persist(target, lambda: self._client.head(key))
            self._integrity.begin(target.path, pin, headers, first)
        return pin, first

    async def _open(self, key: str, request: RangeRequest, memory: memoryview) -> tuple[Pin, int]:
        pin, length = Pin("", 0), 0

        def receive(head: ResponseHead) -> Scatter | None:
            nonlocal pin, length
            if is_error(head):
                return None
            pin, length = require_range(head, request)
            return Scatter([memory[:length]])

        try:
            await self._get(key, request, receive)
        except Failed as failed:
            if failed.failure.status == 416:  # no range of an empty object can be satisfied
                return Pin("", 0), 0
            raise
        return pin, length

    async def read(self, key: str, pin: Pin, start: int, scatter: Scatter) -> None:
        """Fill `scatter` with the bytes of an object from `start` on."""
        if not scatter.nbytes:
            return
        target = Target(self._bucket, key, start, start + scatter.nbytes)
        async with self._turns:
            await self._persist(target, lambda: self._read(key, pin, start, scatter), lambda: scatter.filled)
            if self._integrity is not None and not await self._integrity.is_right(target.path, pin, start, scatter):
                await self._read_again(self._integrity, target, pin, scatter)

    async def _read(self, key: str, pin: Pin, start: int, scatter: Scatter) -> None:
        request = RangeRequest(start + scatter.filled, start + scatter.nbytes, pin)

        def receive(head: ResponseHead) -> Scatter | None:
            if is_error(head):
                return None
            require_range(head, request)
            return scatter

        await self._get(key, request, receive)

    async def _read_again(self, integrity: Integrity, target: Target, pin: Pin, scatter: Scatter) -> None:
        """Read bytes that do not match once more, to find out what is wrong.

        An object that was read in one go is mended so. Of one that was read in ranges, others have the bytes already.

        Raises
        ------
        ChecksumError
        """
        self._report(Retried(target.path, _UNMATCHED, 0.0, 1, None, None))
        if scatter.nbytes == pin.size:
            scatter.rewind()
            await self._persist(target, lambda: self._read(target.key, pin, 0, scatter), lambda: scatter.filled)
            if await integrity.is_right(target.path, pin, 0, scatter):
                return
        for start, stop, crc in integrity.ranges(target.path):
            spare = Scatter([memoryview(bytearray(stop - start))])
            part = target._replace(start=start, stop=stop)
            await self._persist(part, lambda: self._read(target.key, pin, start, spare), lambda: spare.filled)  # noqa: B023
            if await integrity.crc_of(target.path, spare) != crc:
                raise part.error(_CORRUPTED, 2)
        raise target.error(_MISMATCH, 2)

    async def _get(self, key: str, request: RangeRequest, receive: Receive) -> None:
        headers = {"Range": f"bytes={request.start}-{request.stop - 1}"}
        if request.pin is not None:
            headers["If-Match"] = request.pin.etag
        if self._transport is None:
            self._transport = self._make_transport()
        response = await self._transport.get(key, headers, receive)
        if response.head.status != 206:
            raise Failed(failure_of_response(response.head, response.error_body))

    async def _persist(self, target: Target, attempt: Callable[[], Awaitable[T]], filled: Callable[[], int] = int) -> T:
        """Make a request until it succeeds, or until nothing helps any more."""
        retries = Retries(self._policy)
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._policy.deadline_s
        last: Failure | None = None
        attempts = 0
        try:
            async with asyncio.timeout_at(deadline) as limit:
                while True:
                    attempts += 1
                    before = filled()
                    generation = self._client.generation
                    try:
                        await self._client.start()
                        return await attempt()
                    except Failed as failed:
                        last = failed.failure
                    pause = retries.pause_after(last, has_progressed=filled() > before)
                    if pause is None or clock() + pause > deadline:
                        raise target.error(last, attempts)
                    self._report(Retried(target.path, last.reason, pause, attempts, last.status, last.request_id))
                    if last.action in REMEDIES:
                        await self._remedy(target, last, generation, attempts)
                    await asyncio.sleep(pause)
        except TimeoutError:
            if not limit.expired():
                raise
            reason = f"no success within {self._policy.deadline_s:g} s (deadline_s)"
            if last is not None:
                reason += f"; the last failure: {last.reason}"
            failure = Failure(reason, action=Action.RETRY, kind=StoreTimeoutError)
            raise target.error(failure, attempts) from None

    async def _remedy(self, target: Target, failure: Failure, generation: int, attempts: int) -> None:
        try:
            await self._client.remedy(failure, generation)
        except Failed as failed:
            raise target.error(failed.failure, attempts) from None
