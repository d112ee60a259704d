"""An S3 server on a local port that makes the errors which a test scripts."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Self

from asyncshard.testing.s3_answers import S3Object, S3State
from asyncshard.testing.s3_connection import S3Connection, S3Shared
from asyncshard.testing.s3_request import S3Fault, S3Request


class S3Server:
    """A server that serves objects from memory over HTTP/1.1 like S3, and logs its requests.

    It runs on the caller's event loop. It supports GetObject and HeadObject with `Range` and `If-Match`, ListObjectsV2,
    GetBucketLocation and HeadBucket, in path style and in virtual-hosted style (``Host: bucket.localhost``, or any host
    that begins with the name of a bucket and a dot). Signatures are not checked.

    `aclose` closes every connection, and leaves no task and no socket. If the server itself fails, for example in the
    function `when` of a fault, it closes the connection, and `until` and `aclose` raise the error.

    Parameters
    ----------
    tls : ssl.SSLContext, optional
        TLS context of the server; without one the server speaks plain HTTP.
    latency_s : float
        Every answer begins this many seconds later.
    host : str
        The address to listen at.
    buckets : iterable of str
        Names of the buckets at the beginning; `put` makes others.
    max_keys : int
        A page of a listing has at most this many entries.
    region : str
        The region of all buckets.
    clock : callable
        Function that returns the time for `Date` and `Last-Modified`, in seconds since 1970.

    Attributes
    ----------
    faults : list of S3Fault
        The scripted errors. For each request, the first fault that takes it is used; it stays in the list.
    requests : list of S3Request
        All requests in the order of their arrival.
    connections_made, connections_open : int
        The number of TCP connections that were made, and of those that are open.
    bytes_sent : int
        The number of bytes of bodies that were handed to the transport.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        latency_s: float = 0.0,
        host: str = "127.0.0.1",
        buckets: Iterable[str] = ("models",),
        max_keys: int = 1000,
        region: str = "us-east-1",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.connections_made = 0
        self._tls = tls
        self._host = host
        self._buckets: dict[str, dict[str, S3Object]] = {bucket: {} for bucket in buckets}
        self._shared = S3Shared(S3State(self._buckets, max_keys, region), latency_s, clock)
        self._listener: socket.socket | None = None
        self._port = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Listen on a free port."""
        if self._listener is not None:
            raise RuntimeError("the server has been started already")
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server((self._host, 0), family=family, backlog=1024)
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept, self._listener)

    async def aclose(self) -> None:
        """Stop listening, and close every connection, even one that waits or hangs. It may be called twice."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def endpoint_url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self._port}"

    @property
    def faults(self) -> list[S3Fault]:
        return self._shared.faults

    @faults.setter
    def faults(self, faults: list[S3Fault]) -> None:
        self._shared.faults = faults

    @property
    def requests(self) -> list[S3Request]:
        return self._shared.requests

    @property
    def bytes_sent(self) -> int:
        return self._shared.bytes_sent

    @property
    def connections_open(self) -> int:
        return len(self._connections)

    def put(
        self,
        bucket: str,
        key: str,
        data: bytes | bytearray | memoryview,
        *,
        etag: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Store an object, or replace the object of this key, and return its ETag.

        Parameters
        ----------
        bucket, key : str
            Where the object is stored. A bucket that does not exist is made.
        data : bytes, bytearray or memoryview
            The bytes of the object. `bytes` are not copied; a `bytearray` or a `memoryview` is.
        etag : str, optional
            The ETag; by default the MD5 of the bytes. Quotes are added if it has none.
        headers : mapping of str to str, optional
            Further headers of answers to GET and HEAD. Headers that begin with ``x-amz-checksum-`` are sent as S3 sends
            them: with whole objects, if the request asks for them.
        """
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        if etag is None:
            etag = hashlib.md5(view, usedforsecurity=False).hexdigest()
        if not etag.startswith(('"', "W/")):
            etag = f'"{etag}"'
        self._buckets.setdefault(bucket, {})[key] = S3Object(view, etag, dict(headers or {}), self._shared.clock())
        return etag

    def remove(self, bucket: str, key: str) -> None:
        """Remove an object from a bucket."""
        del self._buckets[bucket][key]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds.

        The condition is evaluated whenever a connection was made or has ended, a request has arrived, or bytes of a
        body were sent.
        """
        while not condition():
            if self._error is not None:
                raise self._error
            self._shared.changed.clear()
            await self._shared.changed.wait()

    def _accept(self, listener: socket.socket) -> None:
        # `loop.sock_accept` is no alternative: a cancel may lose a connection which has just been made.
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        connection = S3Connection(self._shared, sock, self.connections_made)
        self.connections_made += 1
        task = asyncio.get_running_loop().create_task(connection.run(self._tls))
        self._connections.add(task)
        task.add_done_callback(connection.close_unused)
        task.add_done_callback(self._forget)
        self._shared.changed.set()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
        self._shared.changed.set()
