"""One request and its response, fed by hand as a connection feeds it: no socket and no server.

Time limits and cancelling are tested over connections, in ``test_connection.py``.
"""

import asyncio

import pytest

from asyncshard.errors import StoreError, TruncatedError
from asyncshard.stores.http.exchange import Exchange, Limits
from asyncshard.stores.http.failures import Action, Failed
from asyncshard.stores.http.response import MAX_ERROR_BYTES
from asyncshard.stores.scatter import Scatter

LIMITS = Limits(connect_timeout_s=60, read_timeout_s=60, slow_bytes=1, slow_window_s=60)
HEAD = b"HTTP/1.1 206 X\r\nContent-Length: 10\r\n\r\n"
CHUNKED = b"HTTP/1.1 206 X\r\nTransfer-Encoding: chunked\r\n\r\n"


class Feeder:
    """An exchange whose body of 10 bytes goes into `memory`, and the bytes that a connection would hand to it."""

    def __init__(self, *, is_first=True):
        self.memory = bytearray(10)
        self.staging = memoryview(bytearray(1 << 16))
        self.exchange = Exchange("/a?b", [("Host", "localhost")], self.receive, LIMITS, is_first=is_first)
        self.windows = []

    def receive(self, head):
        return Scatter([memoryview(self.memory)]) if head.status == 206 else None

    def feed(self, data):
        """Hand over bytes as they fit into the windows that the exchange offers."""
        while data and not self.exchange.is_over:
            window = self.exchange.window(self.staging)
            self.windows.append(len(window))
            nbytes = min(len(window), len(data))
            window[:nbytes] = data[:nbytes]
            self.exchange.advance(nbytes, self.staging)
            data = data[nbytes:]

    async def failure(self):
        with pytest.raises(Failed) as caught:
            await self.exchange.response()
        failure = caught.value.failure
        return failure.kind, failure.action


async def test_the_request_is_a_get_of_the_target_with_the_headers():
    request = Feeder().exchange.request
    assert request.startswith(b"GET /a?b HTTP/1.1\r\n")
    assert b"host: localhost\r\n" in request.lower()
    assert request.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("nbytes", [1, 3, 1000])
async def test_the_body_is_placed_however_the_response_is_cut(nbytes):
    feeder = Feeder()
    answer = HEAD + b"0123456789"
    for start in range(0, len(answer), nbytes):
        feeder.feed(answer[start : start + nbytes])
    response = await feeder.exchange.response()
    assert (response.head.status, response.error_body, feeder.memory) == (206, b"", b"0123456789")
    assert not feeder.exchange.spoils_connection


async def test_after_the_head_no_window_is_larger_than_the_rest_of_the_body():
    feeder = Feeder()
    feeder.feed(HEAD + b"012")
    assert len(feeder.exchange.window(feeder.staging)) == 7
    feeder.feed(b"345")
    assert len(feeder.exchange.window(feeder.staging)) == 4
    feeder.feed(b"6789")
    await feeder.exchange.response()


async def test_bytes_behind_the_body_are_not_placed_and_spoil_the_connection():
    feeder = Feeder()
    feeder.feed(HEAD + b"0123456789more")
    await feeder.exchange.response()
    assert feeder.memory == b"0123456789"
    assert feeder.exchange.spoils_connection


async def test_a_chunked_body_is_placed():
    feeder = Feeder()
    feeder.feed(CHUNKED + b"4\r\n0123\r\n6\r\n456789\r\n0\r\n\r\n")
    await feeder.exchange.response()
    assert feeder.memory == b"0123456789"
    assert not feeder.exchange.spoils_connection


async def test_a_chunked_body_that_is_longer_than_asked_for_is_refused():
    feeder = Feeder()
    feeder.feed(CHUNKED + b"b\r\n0123456789x\r\n0\r\n\r\n")
    assert await feeder.failure() == (StoreError, Action.GIVE_UP)
    assert feeder.memory == bytes(10)


async def test_a_chunked_body_that_is_shorter_than_asked_for_is_cut():
    feeder = Feeder()
    feeder.feed(CHUNKED + b"4\r\n0123\r\n0\r\n\r\n")
    assert await feeder.failure() == (TruncatedError, Action.RETRY)


async def test_the_body_of_an_error_may_end_with_the_connection():
    feeder = Feeder()
    feeder.feed(b"HTTP/1.1 500 X\r\nConnection: close\r\n\r\n<Error/>")
    assert not feeder.exchange.is_over
    feeder.exchange.end_of_stream()
    response = await feeder.exchange.response()
    assert (response.head.status, response.error_body) == (500, b"<Error/>")
    assert feeder.exchange.spoils_connection


async def test_of_an_endless_error_enough_is_kept():
    feeder = Feeder()
    feeder.feed(b"HTTP/1.1 500 X\r\n\r\n" + b"x" * (2 * MAX_ERROR_BYTES))
    response = await feeder.exchange.response()
    assert MAX_ERROR_BYTES < len(response.error_body) < 2 * MAX_ERROR_BYTES
    assert feeder.exchange.spoils_connection


@pytest.mark.parametrize(
    ("received", "is_first", "failure"),
    [
        (b"", True, (StoreError, Action.RETRY)),
        (b"", False, (StoreError, Action.RETRY_AT_ONCE)),
        (HEAD[:9], False, (StoreError, Action.RETRY)),
        (HEAD + b"01234", False, (TruncatedError, Action.RETRY)),
    ],
    ids=["of a new connection", "of an idle connection", "in the head", "in the body"],
)
async def test_a_lost_connection_fails_as_far_as_the_response_had_come(received, is_first, failure):
    feeder = Feeder(is_first=is_first)
    feeder.feed(received)
    feeder.exchange.end_of_stream()
    assert await feeder.failure() == failure


async def test_a_connection_that_is_lost_after_the_response_takes_nothing_away():
    feeder = Feeder()
    feeder.feed(HEAD + b"0123456789")
    feeder.exchange.lose_connection()
    assert (await feeder.exchange.response()).head.status == 206


async def test_what_is_no_http_fails_the_exchange():
    feeder = Feeder()
    feeder.feed(b"220 mail.example ESMTP\r\n\r\n")
    assert await feeder.failure() == (StoreError, Action.RETRY)


async def test_nothing_is_written_after_the_waiting_was_cancelled():
    feeder = Feeder()
    feeder.feed(HEAD + b"012")
    waiting = asyncio.ensure_future(feeder.exchange.response())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    window = feeder.exchange.window(feeder.staging)
    window[:3] = b"xyz"
    assert feeder.memory == b"012" + bytes(7)
