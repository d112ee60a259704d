"""One HTTP/1.1 connection, for one exchange after the other.

A connection on which anything comes unasked is not used again.
"""

from __future__ import annotations

import asyncio
import select
from enum import Enum
from typing import Any

from asyncshard.stores.http.exchange import Exchange, Headers, Limits, Receive
from asyncshard.stores.http.response import Response

_READABLE = select.POLLIN | select.POLLHUP | select.POLLERR


class State(Enum):
    """State of a connection."""

    CONNECTING = "connecting"
    IDLE = "idle"
    BUSY = "in an exchange"
    SPENT = "not to be used again"
    CLOSED = "closed"


class HttpConnection(asyncio.BufferedProtocol):
    """One connection; one exchange at a time. Everything runs on its loop.

    Parameters
    ----------
    limits : Limits
    peers : set of HttpConnection
        All connections whose socket is open; this one adds and removes itself.
    staging : memoryview
        Memory for heads and small pieces. Connections of one loop share it, since a transport fills it and reports
        that without giving way to another in between.
    """

    def __init__(self, limits: Limits, peers: set[HttpConnection], staging: memoryview) -> None:
        self._limits = limits
        self._peers = peers
        self._staging = staging
        self._transport: Any = None
        self._exchange: Exchange | None = None
        """The one in progress."""
        self._exchange_count = 0
        self._is_spent = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the socket is closed."""

    def __repr__(self) -> str:
        return f"<HttpConnection {self.state.value}, {self._exchange_count} exchanges>"

    @property
    def state(self) -> State:
        """Whether the connection is open, and whether an exchange is in progress or may begin."""
        if self.closed.done():
            return State.CLOSED
        if self._exchange is not None:
            return State.BUSY
        if self._is_spent:
            return State.SPENT
        return State.CONNECTING if self._transport is None else State.IDLE

    # For the pool

    def is_usable(self) -> bool:
        """Return whether another exchange may begin: the connection is open, idle, and has nothing unread."""
        if self.state is not State.IDLE or self._transport.is_closing():
            return False
        poll = select.poll()
        poll.register(self._transport.get_extra_info("socket").fileno(), _READABLE)
        return not poll.poll(0)

    def abort(self) -> None:
        """Close at once."""
        self._is_spent = True
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, target: str, headers: Headers, receive: Receive) -> Response:
        """Send a GET and receive its response. When this raises, cancelled or not, nothing is written any more.

        Raises
        ------
        Failed
            The response did not come whole, or `receive` raised.
        """
        exchange = Exchange(target, headers, receive, self._limits, is_first=not self._exchange_count)
        self._exchange = exchange
        self._exchange_count += 1
        is_whole = False
        try:
            if self._transport.is_closing():
                exchange.lose_connection()
            else:
                self._transport.write(exchange.request)
            response = await exchange.response()
            is_whole = True
        finally:
            self._exchange = None
            self._is_spent |= exchange.spoils_connection
            if not is_whole:
                self.abort()
        return response

    # For the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._peers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_spent = True
        self._peers.discard(self)
        if self._exchange is not None:
            self._exchange.lose_connection()
        if not self.closed.done():
            self.closed.set_result(None)

    def eof_received(self) -> bool:
        self._is_spent = True
        if self._exchange is not None:
            self._exchange.end_of_stream()
        return False

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._staging if self._exchange is None else self._exchange.window(self._staging)

    def buffer_updated(self, nbytes: int) -> None:
        if self._exchange is None or self._exchange.is_over:
            self.abort()  # nothing was asked for
        else:
            self._exchange.advance(nbytes, self._staging)
