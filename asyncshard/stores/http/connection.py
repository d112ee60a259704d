"""One HTTP/1.1 connection, whose bodies go from the socket to their place.

h11 parses heads, and every body that is not data (errors, chunked ones). The body of a range of known length bypasses
it: the transport receives into the memory that `Scatter.window` gives, once the head has been accepted. Never more than
the body is asked of the socket, so what a server sends beyond it cannot land in the caller's memory; a connection on
which anything comes unasked is not used again.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Any, NamedTuple

import h11

from asyncshard.errors import StoreError, StoreTimeoutError, TruncatedError
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.response import MAX_ERROR_BYTES, Head
from asyncshard.stores.scatter import Scatter

_HEAD_BYTES = 8 << 10
"""Read at a time while a head is expected: what of the body comes with it is copied."""
_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR

Headers = list[tuple[str, str]]
Receive = Callable[[Head], Scatter | None]
"""Decides from its head where a body goes: into a scatter of just its length, or, with None, as an error's, into the
answer. What it raises fails the exchange."""


class Limits(NamedTuple):
    """When an answer counts as lost."""

    connect_timeout_s: float
    read_timeout_s: float
    """Without any byte."""
    slow_bytes: int
    """Fewer bytes of a body than this..."""
    slow_window_s: float
    """...in this time."""


class Response(NamedTuple):
    """What came of an exchange."""

    head: Head
    error_body: bytes
    """Empty where the body went to a scatter."""


class HttpConnection(asyncio.BufferedProtocol):
    """One connection; one exchange at a time. Everything runs on its loop.

    Parameters
    ----------
    limits : Limits
    peers : set of HttpConnection
        It is in there as long as its socket is open.
    staging : memoryview
        Takes heads and small pieces. Connections of one loop share it, since a transport fills what it was given and
        says so in one go.
    """

    def __init__(self, limits: Limits, peers: set[HttpConnection], staging: memoryview) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._peers = peers
        self._staging = staging
        self._transport: Any = None
        self._parser: h11.Connection | None = None
        """Of the exchange in progress."""
        self._receive: Receive | None = None
        self._head: Head | None = None
        self._scatter: Scatter | None = None
        self._is_direct = False
        """Whether the body bypasses the parser."""
        self._error_body = bytearray()
        self._result: asyncio.Future[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._last_byte = 0.0
        self._window_began = 0.0
        self._window_bytes = 0
        self._has_answered = False
        """Whether anything has come since the request was sent."""
        self._exchanges = 0
        self._is_spoiled = False
        self.closed: asyncio.Future[None] = self._loop.create_future()
        """Done when the socket is closed."""

    # For the pool

    def is_usable(self) -> bool:
        """Whether it may be used again: open, with nothing unread."""
        if self._is_spoiled or self._transport is None or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), _READABLE)
        return not poll.poll(0)

    def abort(self) -> None:
        """Close at once."""
        self._is_spoiled = True
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, target: str, headers: Headers, receive: Receive) -> Response:
        """Send a GET and receive its answer. When it raises, cancelled or not, nothing is written any more.

        Raises
        ------
        Failed
            The answer did not come whole, or `receive` raised.
        """
        parser = h11.Connection(h11.CLIENT)
        request = parser.send(h11.Request(method="GET", target=target, headers=headers))
        assert request is not None
        parser.send(h11.EndOfMessage())
        self._parser, self._receive = parser, receive
        self._head, self._has_answered, self._is_direct = None, False, False
        self._error_body.clear()
        self._exchanges += 1
        result = self._result = self._loop.create_future()
        self._last_byte = self._window_began = self._loop.time()
        self._window_bytes = 0
        self._look_later()
        try:
            if self._transport.is_closing():
                self._fail(self._lost())
            else:
                self._transport.write(request)
            await result
        finally:
            self._scatter = self._receive = self._parser = self._result = None
            if self._watch is not None:
                self._watch.cancel()
            if not result.done() or result.cancelled() or result.exception() is not None:
                self.abort()
        assert self._head is not None
        return Response(self._head, bytes(self._error_body))

    # For the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_spoiled = True
        self._peers.discard(self)
        self._fail(self._lost())
        if not self.closed.done():
            self.closed.set_result(None)

    def eof_received(self) -> bool:
        self._is_spoiled = True
        if self._parser is not None and self._head is not None and not self._is_direct:
            self._parse(b"")  # a body that ends with the connection
        self._fail(self._lost())
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._is_direct and self._scatter is not None:
            return self._scatter.window(self._staging)
        return self._staging[:_HEAD_BYTES]

    def buffer_updated(self, nbytes: int) -> None:
        self._last_byte = self._loop.time()
        self._window_bytes += nbytes
        if self._result is None or self._result.done():
            self.abort()  # nothing was asked for
        elif self._is_direct and self._scatter is not None:
            self._scatter.advance(nbytes)
            self._end_if_full()
        else:
            self._has_answered = True
            self._parse(bytes(self._staging[:nbytes]))

    # The exchange

    def _parse(self, data: bytes) -> None:
        parser = self._parser
        assert parser is not None
        try:
            parser.receive_data(data)
            while not self._is_direct and (event := parser.next_event()) is not h11.NEED_DATA:
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    return
                self._take(parser, event)
        except h11.RemoteProtocolError as error:
            self._fail(_cut(f"the answer is no HTTP: {error}", is_body=self._head is not None))
        except Exception as error:
            self._fail(error)

    def _take(self, parser: h11.Connection, event: Any) -> None:
        if isinstance(event, h11.Response):
            fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            self._head = Head(event.status_code, fields)
            assert self._receive is not None
            self._scatter = self._receive(self._head)
            self._window_began, self._window_bytes = self._loop.time(), 0
            self._look_later()
            if self._scatter is not None and "transfer-encoding" not in fields and "content-length" in fields:
                self._go_direct(parser, event)
        elif isinstance(event, h11.Data):
            if self._scatter is None:
                self._error_body += event.data
                if len(self._error_body) > MAX_ERROR_BYTES:
                    self._is_spoiled = True
                    self._end()
            elif len(event.data) > self._scatter.nbytes - self._scatter.filled:
                raise Failed(Failure("the body is longer than what was asked for", status=206))
            else:
                self._scatter.write(memoryview(event.data))
        elif isinstance(event, h11.EndOfMessage):
            self._is_spoiled |= parser.their_state is not h11.DONE or bool(parser.trailing_data[0])
            if self._scatter is not None and self._scatter.filled < self._scatter.nbytes:
                raise _cut("the body ended early", is_body=True)
            self._end()

    def _go_direct(self, parser: h11.Connection, head: h11.Response) -> None:
        """Receive the rest of the body without the parser."""
        assert self._scatter is not None
        self._is_direct = True
        self._is_spoiled |= head.http_version < b"1.1" or any(
            name == b"connection" and b"close" in value.lower() for name, value in head.headers
        )
        begun = parser.trailing_data[0]
        room = self._scatter.nbytes - self._scatter.filled
        self._is_spoiled |= len(begun) > room
        self._scatter.write(memoryview(begun)[:room])
        self._end_if_full()

    def _end_if_full(self) -> None:
        if self._scatter is not None and self._scatter.filled == self._scatter.nbytes:
            self._end()

    def _end(self) -> None:
        self._scatter = None
        if self._result is not None and not self._result.done():
            self._result.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._scatter = None
        if self._result is not None and not self._result.done():
            self._result.set_exception(error)

    def _lost(self) -> Failed:
        if self._has_answered:
            return _cut("the connection was closed in the middle of the answer", is_body=self._head is not None)
        if self._exchanges > 1:
            return Failed(Failure("the server had closed the idle connection", action=Action.RETRY_AT_ONCE))
        return _cut("the server closed the connection without an answer", is_body=False)

    # Time

    def _look_later(self) -> None:
        """Look after the answer when it may be late."""
        due = self._last_byte + self._limits.read_timeout_s
        if self._head is not None:
            due = min(due, self._window_began + self._limits.slow_window_s)
        if self._watch is not None:
            self._watch.cancel()
        # At least the clock's grain later, or it could come to the same moment again.
        self._watch = self._loop.call_later(max(due - self._loop.time(), 0.001), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self._result is None or self._result.done():
            return
        if now - self._last_byte >= self._limits.read_timeout_s:
            self._time_out(f"no byte came for {self._limits.read_timeout_s:g} s (read_timeout_s)")
            return
        if self._head is not None and now - self._window_began >= self._limits.slow_window_s:
            if self._window_bytes < self._limits.slow_bytes:
                self._time_out(f"only {self._window_bytes:,} bytes came in {self._limits.slow_window_s:g} s")
                return
            self._window_began, self._window_bytes = now, 0
        self._look_later()

    def _time_out(self, reason: str) -> None:
        self._fail(Failed(Failure(reason, action=Action.RETRY, kind=StoreTimeoutError)))


def _cut(reason: str, *, is_body: bool) -> Failed:
    return Failed(Failure(reason, action=Action.RETRY, kind=TruncatedError if is_body else StoreError))
