"""An S3 server on a local port that does wrong what a test tells it to."""

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
    """Serves objects in memory over HTTP/1.1 like S3, and logs what it is asked. It runs on the caller's event loop.

    It knows GetObject and HeadObject with `Range` and `If-Match`, ListObjectsV2, GetBucketLocation and HeadBucket, in
    path style and in virtual-hosted style (``Host: bucket.localhost``, or any host that begins with the name of a
    bucket and a dot). Signatures are not checked. `aclose` closes every connection, and leaves no task and no socket.
    Where the server itself fails, say in a fault's `when`, it closes the connection, and `until` and `aclose` raise the
    error.

    Parameters
    ----------
    tls : ssl.SSLContext, optional
        The server's side of TLS.
    latency_s : float
        How much later every answer begins.
    host : str
        The address to listen at.
    buckets : iterable of str
        Names of the buckets at the beginning; `put` makes others.
    max_keys : int
        Most entries in a page of a listing.
    region : str
        What buckets say of their region.
    clock : callable
        The time for `Date` and `Last-Modified`, in seconds since 1970.

    Attributes
    ----------
    faults : list of S3Fault
        What goes wrong. The first one that takes a request is used; it stays in the list.
    requests : list of S3Request
        In the order of arrival.
    connections_made, connections_open : int
        TCP connections.
    bytes_sent : int
        Bytes of bodies handed to the transport.
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
        """Close every connection, whatever it does, and stop. It may be called twice."""
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
        """Store an object, in place of another or new, and return its ETag, by default the quoted MD5 of its bytes.

        `bytes` are not copied, a `bytearray` or a `memoryview` is. The headers are sent with every answer; those that
        begin with ``x-amz-checksum-`` as S3 sends them, with whole objects and on demand.
        """
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        if etag is None:
            etag = hashlib.md5(view, usedforsecurity=False).hexdigest()
        if not etag.startswith(('"', "W/")):
            etag = f'"{etag}"'
        self._buckets.setdefault(bucket, {})[key] = S3Object(view, etag, dict(headers or {}), self._shared.clock())
        return etag

    def remove(self, bucket: str, key: str) -> None:
        """Take an object away."""
        del self._buckets[bucket][key]

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds.

        It is looked at whenever a connection is made or has ended, a request has arrived, or bytes of a body were sent.
        """
        while not condition():
            if self._error is not None:
                raise self._error
            self._shared.changed.clear()
            await self._shared.changed.wait()

    def _accept(self, listener: socket.socket) -> None:
        # Not `sock_accept`: cancelling that may lose a connection which has just been made.
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
