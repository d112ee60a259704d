"""One GET over HTTP/1.1 and its answer, whose body goes from the socket to its place.

h11 parses heads, and every body that is not data (errors, chunked ones). The body of a range of known length bypasses
it: the transport receives into the memory that `Scatter.window` gives, once the head has been accepted. Never more than
the body is asked of the socket, so what a server sends beyond it cannot land in the caller's memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import h11

from asyncshard.errors import StoreError, StoreTimeoutError, TruncatedError
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.response import MAX_ERROR_BYTES, Response, ResponseHead
from asyncshard.stores.scatter import Scatter

_HEAD_BYTES = 8 << 10
"""8 KiB are read at a time while a head is expected: what comes of the body with it is copied."""

Headers = list[tuple[str, str]]
Receive = Callable[[ResponseHead], Scatter | None]
"""Decides from the head of a response where its body goes: into a scatter of just its length, or, with None, as an
error's body, into the `Response`. What it raises fails the exchange."""


class Limits(NamedTuple):
    """When a response counts as lost."""

    connect_timeout_s: float
    """Seconds until a connection is made."""
    read_timeout_s: float
    """Seconds without any byte."""
    slow_bytes: int
    """Fewer bytes of a body than this..."""
    slow_window_s: float
    """...in this many seconds."""


class Exchange:
    """One request and its response on a connection, which hands it what arrives. Everything runs on its loop.

    Parameters
    ----------
    target : str
        What the request line asks for.
    headers : list of (str, str)
    receive : Receive
    limits : Limits
    is_first : bool
        Whether the connection is new. The server may have closed one that was used before while it was idle.
    """

    def __init__(self, target: str, headers: Headers, receive: Receive, limits: Limits, *, is_first: bool) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._limits = limits
        self._is_first = is_first
        self._parser = h11.Connection(h11.CLIENT)
        request = self._parser.send(h11.Request(method="GET", target=target, headers=headers))
        assert request is not None
        self.request = request
        """The bytes to be sent."""
        self._parser.send(h11.EndOfMessage())
        self.spoils_connection = False
        """Whether no other exchange may follow on the connection."""
        self._head: ResponseHead | None = None
        self._scatter: Scatter | None = None
        self._is_direct = False
        """Whether the body bypasses the parser."""
        self._error_body = bytearray()
        self._has_answered = False
        """Whether any byte has come."""
        self._result: asyncio.Future[None] = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None
        self._last_byte = self._window_began = self._loop.time()
        self._window_bytes = 0

    @property
    def is_over(self) -> bool:
        """Whether the response is there or has failed: nothing is written any more."""
        return self._result.done()

    async def response(self) -> Response:
        """Wait for the response. When this raises, cancelled or not, nothing is written any more.

        Raises
        ------
        Failed
            The response did not come whole, or `receive` raised.
        """
        self._look_later()
        try:
            await self._result
        finally:
            self._scatter = None
            if self._watch is not None:
                self._watch.cancel()
        assert self._head is not None
        return Response(self._head, bytes(self._error_body))

    # For the connection

    def window(self, staging: memoryview) -> memoryview:
        """Return memory for the bytes that come next: the caller's, or some of `staging`."""
        if self._is_direct and self._scatter is not None:
            return self._scatter.window(staging)
        return staging[:_HEAD_BYTES]

    def advance(self, nbytes: int, staging: memoryview) -> None:
        """Take the bytes that came into the last window."""
        self._last_byte = self._loop.time()
        self._window_bytes += nbytes
        if self._is_direct and self._scatter is not None:
            self._scatter.advance(nbytes)
            self._end_if_full()
        else:
            self._has_answered = True
            self._parse(bytes(staging[:nbytes]))

    def end_of_stream(self) -> None:
        """Note that the server sends nothing more: the end of some bodies, and of all other exchanges a failure."""
        if self._head is not None and not self._is_direct and not self.is_over:
            self._parse(b"")
        self.lose_connection()

    def lose_connection(self) -> None:
        """Fail, unless the response is there: the connection is closed."""
        if self._has_answered:
            self._fail(_cut("the connection was closed in the middle of the answer", is_body=self._head is not None))
        elif self._is_first:
            self._fail(_cut("the server closed the connection without an answer", is_body=False))
        else:
            self._fail(Failed(Failure("the server had closed the idle connection", action=Action.RETRY_AT_ONCE)))

    # The response

    def _parse(self, received: bytes) -> None:
        try:
            self._parser.receive_data(received)
            while not self._is_direct and (event := self._parser.next_event()) is not h11.NEED_DATA:
                if event is h11.PAUSED or isinstance(event, h11.ConnectionClosed):
                    return
                if isinstance(event, h11.Response):
                    self._take_head(event)
                elif isinstance(event, h11.Data):
                    self._take_body(event.data)
                elif isinstance(event, h11.EndOfMessage):
                    self._take_end()
        except h11.RemoteProtocolError as error:
            self._fail(_cut(f"the answer is no HTTP: {error}", is_body=self._head is not None))
        except Exception as error:
            self._fail(error)

    def _take_head(self, event: h11.Response) -> None:
        fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        self._head = ResponseHead(event.status_code, fields)
        self._scatter = self._receive(self._head)
        self._window_began, self._window_bytes = self._loop.time(), 0
        self._look_later()
        if self._scatter is not None and "transfer-encoding" not in fields and "content-length" in fields:
            self._go_direct(self._scatter, event)

    def _go_direct(self, scatter: Scatter, head: h11.Response) -> None:
        """Receive the rest of the body without the parser."""
        self._is_direct = True
        self.spoils_connection |= head.http_version < b"1.1" or any(
            name == b"connection" and b"close" in value.lower() for name, value in head.headers
        )
        begun = self._parser.trailing_data[0]
        room = scatter.nbytes - scatter.filled
        self.spoils_connection |= len(begun) > room
        scatter.write(memoryview(begun)[:room])
        self._end_if_full()

    def _take_body(self, data: bytes | bytearray) -> None:
        if self._scatter is None:
            self._error_body += data
            if len(self._error_body) > MAX_ERROR_BYTES:
                self.spoils_connection = True
                self._end()
        elif len(data) > self._scatter.nbytes - self._scatter.filled:
            raise Failed(Failure("the body is longer than what was asked for", status=206))
        else:
            self._scatter.write(memoryview(data))

    def _take_end(self) -> None:
        self.spoils_connection |= self._parser.their_state is not h11.DONE or bool(self._parser.trailing_data[0])
        if self._scatter is not None and self._scatter.filled < self._scatter.nbytes:
            raise _cut("the body ended early", is_body=True)
        self._end()

    def _end_if_full(self) -> None:
        if self._scatter is not None and self._scatter.filled == self._scatter.nbytes:
            self._end()

    def _end(self) -> None:
        self._scatter = None
        if not self._result.done():
            self._result.set_result(None)

    def _fail(self, error: Exception) -> None:
        self._scatter = None
        if not self._result.done():
            self._result.set_exception(error)

    # Time

    def _look_later(self) -> None:
        """Look after the response when it may be late."""
        due = self._last_byte + self._limits.read_timeout_s
        if self._head is not None:
            due = min(due, self._window_began + self._limits.slow_window_s)
        if self._watch is not None:
            self._watch.cancel()
        # At least the clock's grain later, or it could come to the same moment again.
        self._watch = self._loop.call_later(max(due - self._loop.time(), 0.001), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self._result.done():
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
