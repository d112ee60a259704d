"""Objects of S3 below one prefix, or one object."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from asyncshard.errors import ObjectNotFoundError, TruncatedError
from asyncshard.extras import require
from asyncshard.stores.base import ETAG, Listing, ObjectMeta, Pacing, State, Store
from asyncshard.stores.http.response import Pin
from asyncshard.stores.s3.options import S3Options
from asyncshard.stores.scatter import Scatter
from asyncshard.tasks.loop_thread import LoopThread
from asyncshard.tasks.threads import wait_to_end

if TYPE_CHECKING:
    from asyncshard.stores.s3.reader import S3Reader

T = TypeVar("T")
DEFAULT_MAX_WORKERS = 16
_MIB = 1 << 20
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")


class S3Store(Store):
    """A prefix or an object of a bucket, on AWS or any server that speaks its protocol.

    Requests, signatures and the bodies of responses are the work of an event loop in a thread of its own. The
    application's loop hears only when a read is done. Objects are pinned by ETag from their first response on.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix`` or ``s3://bucket/key``. The key is taken as it stands: nothing in it is decoded.
    max_workers : int, optional
        Range requests in flight at most.
    **options
        See `S3Options`.

    Raises
    ------
    ValueError
        A URL without a bucket, or an option out of range.
    TypeError
        An option that does not exist.
    ImportError
        The packages that S3 needs are not installed.
    """

    def __init__(self, url: str, *, max_workers: int | None = None, **options: Any) -> None:
        self._options = S3Options.from_keywords(options)
        self._bucket, self._key = split_url(url)
        self.url = f"s3://{self._bucket}/{self._key}"
        if self._options.verify_checksums:
            require(f"{self.url} with verify_checksums", "aiobotocore", "h11", "awscrt")
        else:
            require(self.url, "aiobotocore", "h11")
        self.max_workers = max_workers or DEFAULT_MAX_WORKERS
        max_gap_bytes = self._options.max_gap_bytes
        if max_gap_bytes is None:
            max_gap_bytes = 0 if self._options.verify_checksums else _MIB
        # As many read and waiting for the consumer as are in flight, or the connections would run dry at every tensor.
        self.pacing = Pacing(8 * _MIB, 2 * self.max_workers, max_gap_bytes)
        self._prefix = self._key if not self._key or self._key.endswith("/") else f"{self._key}/"
        self._loop = LoopThread("asyncshard-s3")
        self._reader: S3Reader | None = None
        self._state = State.OPEN
        self._reads_in_flight = 0

    def _facts(self) -> tuple[str, ...]:
        return self._state.value, f"{self.max_workers} workers", f"{self._reads_in_flight} reads in flight"

    def path_of(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._prefix}{name}"

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        pin: Pin = meta.version
        return f"{ETAG}{pin.etag} {pin.size}"

    def identity(self, meta: ObjectMeta) -> str:
        pin: Pin = meta.version
        return json.dumps(
            ["s3", self._options.endpoint_url, self._bucket, self._prefix + meta.name, pin.etag, pin.size]
        )

    async def aclose(self) -> None:
        if self._state is State.OPEN:
            self._state = State.CLOSING
            await wait_to_end(asyncio.ensure_future(self._close()))  # to its end, even when cancelled

    async def _close(self) -> None:
        try:
            if self._reader is not None:
                await self._loop.run(self._reader.aclose)
        finally:
            await self._loop.aclose()
            self._state = State.CLOSED

    async def list(self) -> Listing:
        return await self._run(self._list)

    async def _list(self, reader: S3Reader) -> Listing:
        is_directory = not self._key or self._key.endswith("/")
        if not is_directory and self._key.endswith(".safetensors"):
            try:
                return await self._list_file(reader)
            except ObjectNotFoundError:
                is_directory = True  # an odd name for a prefix, but a legal one
        names = await reader.list_names(self._prefix)
        if names:
            return Listing(tuple(sorted(names)), is_file=False)
        if not is_directory:
            return await self._list_file(reader)
        raise ObjectNotFoundError(
            f"{self.url}: there is neither an object of this key nor one below it: check the prefix", path=self.url
        )

    async def _list_file(self, reader: S3Reader) -> Listing:
        await reader.head(self._key)
        folder, _, name = self._key.rpartition("/")
        self._prefix = f"{folder}/" if folder else ""
        return Listing((name,), is_file=True)

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        pin, first = await self._run(lambda reader: reader.open(self._prefix + name, nbytes))
        return ObjectMeta(name, pin.size, pin), first

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        pin: Pin = meta.version
        stop = start + sum(buffer.nbytes for buffer in buffers)
        if stop > pin.size:
            path = self.path_of(meta.name)
            raise TruncatedError(
                f"{path}: the object has {pin.size:,} bytes, not the {stop:,} that are needed",
                path=path,
                start=start,
                stop=stop,
            )
        self._reads_in_flight += 1
        try:
            # The scatter is made on the store's loop: thousands of buffers take a millisecond.
            await self._run(lambda reader: reader.read(self._prefix + meta.name, pin, start, Scatter(buffers)))
        finally:
            self._reads_in_flight -= 1

    async def _run(self, call: Callable[[S3Reader], Coroutine[Any, Any, T]]) -> T:
        """Call a method of the reader on the store's own loop, where the reader is made first."""

        async def run() -> T:
            if self._reader is None:
                self._reader = self._make_reader()
            return await call(self._reader)

        return await self._loop.run(run)

    def _make_reader(self) -> S3Reader:
        # Here, since importing botocore takes a third of a second.
        from asyncshard.stores.s3.assembly import make_reader

        return make_reader(self._options, self._bucket, self.max_workers, self.report)


def split_url(url: str) -> tuple[str, str]:
    """Return the bucket and the key of an ``s3://`` URL.

    Raises
    ------
    ValueError
        The URL names no bucket, or holds credentials.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise ValueError("an s3:// URL holds no credentials: pass them as storage_options")
    if scheme.lower() != "s3" or not _BUCKET.fullmatch(bucket):
        # Without the URL: a secret with a slash in it may have been put before the bucket.
        raise ValueError("not a URL of S3, or not a valid name of a bucket: write s3://bucket/prefix")
    return bucket, key
