"""One HTTP connection with its exchanges, and a pool of them, against a server that sends what it is told.

Also tests `pool`. Whole loads over all kinds of broken connections are in tests/stores/s3/test_faults.py.
"""

import asyncio
import contextlib
from typing import NamedTuple

import pytest

from asyncshard.errors import StoreError, StoreTimeoutError, TruncatedError
from asyncshard.stores.http.connection import HttpConnection, State
from asyncshard.stores.http.exchange import Limits
from asyncshard.stores.http.failures import Action, Failed
from asyncshard.stores.http.pool import HttpPool, Origin
from asyncshard.stores.http.response import ResponseHead
from asyncshard.stores.scatter import Scatter

LIMITS = Limits(connect_timeout_s=5.0, read_timeout_s=5.0, slow_bytes=1, slow_window_s=5.0)
BODY = bytes(range(256)) * 1024
HEADERS = [("Host", "localhost"), ("Authorization", "SECRET")]


def response(body=BODY, length=None, status=206, more=""):
    return f"HTTP/1.1 {status} X\r\nContent-Length: {length or len(body)}\r\n{more}\r\n".encode() + body


class Last(NamedTuple):
    """An answer after which the server closes the connection."""

    answer: bytes


class Server:
    """Answers the requests of each connection with the bytes that it is given; with none at all where it is None."""

    def __init__(self, answers):
        self.answers = list(answers)
        self.requests = []
        self.writers = []
        self._arrived = asyncio.Event()

    async def serve(self, reader, writer):
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                self._arrived.set()
                answer = self.answers.pop(0)
                if answer is not None:
                    writer.write(answer.answer if isinstance(answer, Last) else answer)
                    await writer.drain()
                if isinstance(answer, Last):
                    break
        writer.close()

    async def requested(self, count):
        """Wait until this many requests have arrived."""
        while len(self.requests) < count:
            self._arrived.clear()
            await self._arrived.wait()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self.serve, "127.0.0.1")
        self.origin = Origin("http", "127.0.0.1", self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await self._server.wait_closed()


class Body:
    """Takes a response's body, as the S3 reader does."""

    def __init__(self, nbytes=None):
        self.memory = bytearray(len(BODY) if nbytes is None else nbytes)
        self.head = None

    def receive(self, head: ResponseHead):
        self.head = head
        return Scatter([memoryview(self.memory)]) if head.status == 206 else None


@contextlib.asynccontextmanager
async def connected(*answers, limits=LIMITS):
    """A server, and a connection to it."""
    peers = set()
    async with Server(answers) as server:
        connection = HttpConnection(limits, peers, memoryview(bytearray(1 << 16)))
        assert connection.state is State.CONNECTING
        await asyncio.get_running_loop().create_connection(lambda: connection, server.origin.host, server.origin.port)
        assert peers == {connection}
        yield server, connection
        connection.abort()
        await connection.closed
        assert peers == set()


async def get(connection, body):
    return await connection.exchange("/a", HEADERS, body.receive)


async def test_a_connection_carries_one_exchange_after_the_other():
    async with connected(response(), response(b"xyz")) as (server, connection):
        first, second = Body(), Body(3)
        assert connection.state is State.IDLE
        await get(connection, first)
        assert connection.is_usable()
        await get(connection, second)
        assert (first.memory, second.memory) == (BODY, b"xyz")
        assert [request.split(b"\r\n")[0] for request in server.requests] == [b"GET /a HTTP/1.1"] * 2


async def test_the_repr_of_a_connection_shows_its_state_and_no_header():
    async with connected(response(), None) as (server, connection):
        assert repr(connection) == "<HttpConnection idle, 0 exchanges>"
        await get(connection, Body())
        waiting = asyncio.ensure_future(get(connection, Body()))
        await server.requested(2)
        assert repr(connection) == "<HttpConnection in an exchange, 2 exchanges>"
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert "not to be used again" in repr(connection) or "closed" in repr(connection)
        assert "SECRET" not in repr(connection)
    assert repr(connection) == "<HttpConnection closed, 2 exchanges>"


async def test_the_body_of_an_error_comes_with_the_response_and_leaves_the_connection_usable():
    async with connected(response(b"<Error/>", status=503)) as (_, connection):
        answer = await get(connection, Body())
        assert (answer.head.status, answer.error_body) == (503, b"<Error/>")
        assert connection.is_usable()


async def test_a_chunked_body_is_placed_too():
    chunked = b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    async with connected(chunked) as (_, connection):
        body = Body(5)
        await get(connection, body)
        assert body.memory == b"abcde"
        assert connection.is_usable()


@pytest.mark.parametrize(
    "answer", [response(more="Connection: close\r\n"), response().replace(b"HTTP/1.1", b"HTTP/1.0")]
)
async def test_a_connection_that_the_server_will_close_is_not_used_again(answer):
    async with connected(answer) as (_, connection):
        body = Body()
        await get(connection, body)
        assert body.memory == BODY
        assert connection.state is State.SPENT
        assert not connection.is_usable()


async def test_bytes_beyond_the_body_are_not_placed_and_spoil_the_connection():
    async with connected(response(b"abcdef", length=3)) as (_, connection):
        memory = bytearray(b"......")
        await connection.exchange("/a", HEADERS, lambda head: Scatter([memoryview(memory)[:3]]))
        assert memory == b"abc..."
        assert not connection.is_usable()


@pytest.mark.parametrize("answer", [Last(b""), b"\0\1\2\r\n\r\n"])
async def test_an_answer_that_is_no_http_fails_the_exchange(answer):
    async with connected(answer) as (_, connection):
        with pytest.raises(Failed) as caught:
            await get(connection, Body())
        assert (caught.value.failure.kind, caught.value.failure.action) == (StoreError, Action.RETRY)
        assert not connection.is_usable()


async def test_a_body_that_ends_early_fails_the_exchange_and_keeps_what_came():
    async with connected(Last(response(BODY[:1000], length=len(BODY)))) as (_, connection):
        body = Body()
        with pytest.raises(Failed) as caught:
            await get(connection, body)
        assert caught.value.failure.kind is TruncatedError
        assert body.memory[:1000] == BODY[:1000]


async def test_an_idle_connection_that_the_server_had_closed_is_no_failure_of_the_server():
    async with connected(response(), Last(b"")) as (_, connection):
        await get(connection, Body())
        with pytest.raises(Failed) as caught:
            await get(connection, Body())
        assert caught.value.failure.action is Action.RETRY_AT_ONCE


async def test_what_the_receiver_raises_fails_the_exchange():
    def refuse(head):
        raise ValueError("not this one")

    async with connected(response()) as (_, connection):
        with pytest.raises(ValueError, match="not this one"):
            await connection.exchange("/a", HEADERS, refuse)
        assert not connection.is_usable()


@pytest.mark.parametrize(
    ("limits", "answer", "reason"),
    [
        (LIMITS._replace(read_timeout_s=0.05), None, "no byte came"),
        (LIMITS._replace(slow_bytes=1 << 20, slow_window_s=0.05), response(BODY[:1000], length=len(BODY)), "only"),
    ],
)
async def test_a_response_that_is_late_or_slow_fails_the_exchange(limits, answer, reason):
    async with connected(answer, limits=limits) as (_, connection):
        with pytest.raises(Failed, match=reason) as caught:
            await get(connection, Body())
        assert caught.value.failure.kind is StoreTimeoutError


async def test_a_cancelled_exchange_closes_the_connection():
    async with connected(None) as (server, connection):
        reading = asyncio.ensure_future(get(connection, Body()))
        await server.requested(1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert not connection.is_usable()


async def test_bytes_that_nobody_asked_for_close_an_idle_connection():
    async with connected(response()) as (server, connection):
        await get(connection, Body())
        server.writers[0].write(b"unasked")
        await connection.closed
        assert connection.state is State.CLOSED


async def test_a_pool_uses_an_idle_connection_again_and_closes_all_in_the_end():
    async with Server([response(), response(), response(more="Connection: close\r\n"), response()]) as server:
        pool = HttpPool(LIMITS, lambda: pytest.fail("no TLS is needed"))
        for _ in range(4):
            body = Body()
            await pool.exchange(server.origin, "/a", HEADERS, body.receive)
            assert body.memory == BODY
        assert len(server.writers) == 2
        await pool.aclose()


async def test_a_pool_does_not_use_a_connection_that_was_idle_for_long():
    async with Server([response(), response()]) as server:
        pool = HttpPool(LIMITS, lambda: pytest.fail("no TLS is needed"), idle_s=-1.0)
        for _ in range(2):
            await pool.exchange(server.origin, "/a", HEADERS, Body().receive)
        assert len(server.writers) == 2
        await pool.aclose()


async def test_a_pool_names_the_server_that_is_not_there():
    async with Server([]) as server:
        pass
    pool = HttpPool(LIMITS, lambda: pytest.fail("no TLS is needed"))
    with pytest.raises(Failed, match=f"127.0.0.1:{server.origin.port}") as caught:
        await pool.exchange(server.origin, "/a", HEADERS, Body().receive)
    assert caught.value.failure.action is Action.RETRY
    await pool.aclose()
