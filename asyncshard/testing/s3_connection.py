"""One connection to an `S3Server`: it reads requests, and sends the answers of `s3_answers` as their faults say."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from asyncshard.testing.s3_answers import Answer, S3State, answer_to, bad_request
from asyncshard.testing.s3_request import S3Fault, S3Request, parse_request

_HEAD_BYTES = 1 << 20
"""The head of a request has at most 1 MiB."""
_PIECE_BYTES = 256 << 10
"""Bodies are read and sent in pieces of at most 256 KiB."""
_NO_FAULT = S3Fault(times=None)
"""The fault of a request with which nothing goes wrong."""


@dataclass(slots=True, eq=False)
class S3Shared:
    """The state that a server shares with its connections."""

    state: S3State
    latency_s: float
    """Every answer begins this many seconds later."""
    clock: Callable[[], float]
    """Function that returns the seconds since 1970."""
    faults: list[S3Fault] = field(default_factory=list)
    """The faults of the server. For each request, the first fault that takes it is used."""
    requests: list[S3Request] = field(default_factory=list)
    """All requests in the order of their arrival."""
    bytes_sent: int = 0
    """The number of bytes of bodies that were handed to the transports."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever this state or a connection has changed."""

    def log(self, request: S3Request) -> tuple[int, S3Fault]:
        """Log a request; return its number and its fault."""
        self.requests.append(request)
        self.changed.set()
        return len(self.requests), next((fault for fault in self.faults if fault.takes(request)), _NO_FAULT)

    def count(self, nbytes: int) -> None:
        """Count bytes of a body that were sent."""
        self.bytes_sent += nbytes
        self.changed.set()

    def size_of(self, bucket: str, key: str) -> int | None:
        """Return the bytes of an object; None where there is none."""
        stored = self.state.buckets.get(bucket, {}).get(key)
        return None if stored is None else len(stored.data)


class _Protocol(asyncio.StreamReaderProtocol):
    """The protocol of asyncio's streams, with events for the end of the client and the end of the socket."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        super().__init__(reader)
        self.has_gone = asyncio.Event()
        """Set when the client has closed its side of the connection, or the connection has ended."""
        self.is_lost = asyncio.Event()
        """Set when the socket is closed."""

    def eof_received(self) -> bool | None:
        self.has_gone.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.has_gone.set()
        self.is_lost.set()


class S3Connection:
    """One TCP connection. It reads requests, and sends the answer to each."""

    def __init__(self, shared: S3Shared, sock: socket.socket, number: int) -> None:
        self._shared = shared
        self._sock = sock
        self._number = number
        self._has_transport = False
        self._reader = asyncio.StreamReader(_HEAD_BYTES)
        self._protocol = _Protocol(self._reader)
        self._writer: asyncio.StreamWriter

    def close_unused(self, _: object) -> None:
        """Close the socket if the task of the connection was cancelled before it began."""
        if not self._has_transport:
            self._sock.close()

    async def run(self, tls: ssl.SSLContext | None) -> None:
        """Answer the requests of the connection until it ends."""
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
        """Read one request and answer it; return whether another request may follow on this connection."""
        shared = self._shared
        head = await self._reader.readuntil(b"\r\n\r\n")
        try:
            request = parse_request(head, connection=self._number, buckets=shared.state.buckets, size_of=shared.size_of)
        except ValueError as error:
            self._writer.write(bad_request(str(error)))
            return False
        await self._drop_body(request)
        number, fault = shared.log(request)
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
        delay_s = shared.latency_s + fault.delay_s
        if delay_s:
            await self._unless_gone(asyncio.sleep(delay_s))
        if fault.raw is not None:
            self._writer.write(fault.raw)
            return False
        answer = answer_to(request, fault, shared.state, number=number, now_s=shared.clock())
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
        """Send an answer as far and as fast as the fault allows; return whether another request may follow."""
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
            self._shared.count(len(piece))
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
        """Wait for `awaitable`, and raise its error; raise ConnectionResetError if the client goes before."""
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
        """Close the connection with a reset (RST): the kernel sends one if a socket with SO_LINGER of 0 s is closed."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
