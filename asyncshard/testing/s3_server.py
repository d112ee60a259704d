"""An S3 server on a local port that does wrong what a test tells it to. Only the I/O: `s3_answers` decides."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import socket
import ssl
import struct
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Self

from asyncshard.testing.s3_answers import Answer, S3Object, S3State, answer_to, bad_request
from asyncshard.testing.s3_request import S3Fault, S3Request, parse_request

_HEAD_BYTES = 1 << 20
_PIECE_BYTES = 256 << 10
_NO_FAULT = S3Fault(times=None)


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
        self.faults: list[S3Fault] = []
        self.requests: list[S3Request] = []
        self.connections_made = 0
        self.bytes_sent = 0
        self._tls = tls
        self._latency_s = latency_s
        self._host = host
        self._clock = clock
        self._buckets: dict[str, dict[str, S3Object]] = {bucket: {} for bucket in buckets}
        self._state = S3State(self._buckets, max_keys, region)
        self._listener: socket.socket | None = None
        self._port = 0
        self._connections: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
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
        self._buckets.setdefault(bucket, {})[key] = S3Object(view, etag, dict(headers or {}), self._clock())
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
            self._changed.clear()
            await self._changed.wait()

    def _accept(self, listener: socket.socket) -> None:
        # Not `sock_accept`: cancelling that may lose a connection which has just been made.
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        sock.setblocking(False)
        connection = _Connection(self, sock, self.connections_made)
        self.connections_made += 1
        task = asyncio.get_running_loop().create_task(connection.run(self._tls))
        self._connections.add(task)
        task.add_done_callback(connection.close_unused)
        task.add_done_callback(self._forget)
        self._changed.set()

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._connections.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._error = self._error or task.exception()
        self._changed.set()

    def _log(self, request: S3Request) -> tuple[int, S3Fault]:
        """Log a request; return its number and its fault."""
        self.requests.append(request)
        self._changed.set()
        return len(self.requests), next((fault for fault in self.faults if fault.takes(request)), _NO_FAULT)

    def _count(self, nbytes: int) -> None:
        self.bytes_sent += nbytes
        self._changed.set()

    def _size_of(self, bucket: str, key: str) -> int | None:
        stored = self._buckets.get(bucket, {}).get(key)
        return None if stored is None else len(stored.data)


class _Protocol(asyncio.StreamReaderProtocol):
    """That of asyncio's streams, which also says when the client goes and when the socket is closed."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self.has_gone = asyncio.Event()
        self.is_lost = asyncio.Event()

    def eof_received(self) -> bool | None:
        self.has_gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.has_gone.set()
        self.is_lost.set()


class _Connection:
    """One TCP connection: reads requests, and carries out what was decided about each."""

    def __init__(self, server: S3Server, sock: socket.socket, number: int) -> None:
        self._server = server
        self._sock = sock
        self._number = number
        self._has_transport = False
        self._reader = asyncio.StreamReader(_HEAD_BYTES)
        self._protocol = _Protocol(self._reader)
        self._writer: asyncio.StreamWriter

    def close_unused(self, _: object) -> None:
        """Close the socket where the task was cancelled before it began."""
        if not self._has_transport:
            self._sock.close()

    async def run(self, tls: ssl.SSLContext | None) -> None:
        self._has_transport = True
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: self._protocol, self._sock, ssl=tls)
        except OSError:  # a client that did not finish the TLS handshake
            return
        transport.set_write_buffer_limits(high=_PIECE_BYTES)
        self._writer = asyncio.StreamWriter(transport, self._protocol, self._reader, loop)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError):
                while await self._answer_one():
                    pass
            transport.close()
            await self._protocol.is_lost.wait()
        finally:
            transport.abort()
            await self._protocol.is_lost.wait()

    async def _answer_one(self) -> bool:
        """Read a request and answer it; return whether another may follow."""
        server = self._server
        head = await self._reader.readuntil(b"\r\n\r\n")
        try:
            request = parse_request(head, connection=self._number, buckets=server._buckets, size_of=server._size_of)
        except ValueError as error:
            self._writer.write(bad_request(str(error)))
            return False
        await self._drop_body(request)
        number, fault = server._log(request)
        if fault.before is not None:
            called = fault.before()
            if inspect.isawaitable(called):
                await self._unless_gone(called)
        if fault.refuse:
            self._reset()
            return False
        if fault.hang:
            await self._protocol.has_gone.wait()
            return False
        delay_s = server._latency_s + fault.delay_s
        if delay_s:
            await self._unless_gone(asyncio.sleep(delay_s))
        if fault.raw is not None:
            self._writer.write(fault.raw)
            return False
        answer = answer_to(request, fault, server._state, number=number, now_s=server._clock())
        return await self._send(answer, fault)

    async def _drop_body(self, request: S3Request) -> None:
        left = int(request.headers.get("content-length", "0"))
        if left and request.headers.get("expect", "").lower() == "100-continue":
            self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while left:
            data = await self._reader.read(min(left, _PIECE_BYTES))
            if not data:
                raise ConnectionResetError("the client has gone within the body of its request")
            left -= len(data)

    async def _send(self, answer: Answer, fault: S3Fault) -> bool:
        """Send an answer, as far and as fast as the fault lets it; return whether another may follow."""
        ends = [end for end in (fault.cut_after, fault.stall_after) if end is not None]
        body = answer.body[: min(ends)] if ends else answer.body
        size, pause_s = fault.trickle or (_PIECE_BYTES, None)
        self._writer.write(answer.head())
        for start in range(0, len(body), size):
            piece = body[start : start + size]
            if fault.chunked:
                self._writer.writelines([b"%x\r\n" % len(piece), piece, b"\r\n"])
            else:
                self._writer.write(piece)
            self._server._count(len(piece))
            await self._writer.drain()
            if pause_s is not None:
                await self._unless_gone(asyncio.sleep(pause_s))
        if not ends:
            self._writer.write((b"0\r\n\r\n" if fault.chunked else b"") + fault.surplus)
        elif fault.cut_after == min(ends):
            if fault.resets:
                await self._reset_when_sent()
            return False
        else:
            await self._protocol.has_gone.wait()
            return False
        await self._writer.drain()
        return not answer.is_last

    async def _unless_gone(self, awaitable: Awaitable[object]) -> None:
        """Wait for something, and raise its error, unless the client goes first."""
        wanted, gone = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._protocol.has_gone.wait())
        try:
            done, _ = await asyncio.wait([wanted, gone], return_when=asyncio.FIRST_COMPLETED)
        finally:
            wanted.cancel()
            gone.cancel()
            await asyncio.gather(wanted, gone, return_exceptions=True)
        if gone in done:
            raise ConnectionResetError("the client has gone")
        wanted.result()

    async def _reset_when_sent(self) -> None:
        self._writer.transport.set_write_buffer_limits(high=0)
        await self._writer.drain()
        self._reset()

    def _reset(self) -> None:
        """Close the connection with a reset (RST): closing does that to a socket that lingers for no time."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
