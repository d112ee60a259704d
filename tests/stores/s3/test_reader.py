"""A reader makes requests until they succeed, or says why they cannot: over a transport that does what it is told.

With real connections, and with checksums, this is tested in ``test_faults.py`` and ``test_integrity.py``.
"""

import contextlib
import dataclasses

import pytest

from asyncshard.errors import AccessDeniedError, ObjectChangedError, StoreError, StoreTimeoutError, ThrottledError
from asyncshard.events import Retried
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.response import Pin, Response, ResponseHead
from asyncshard.stores.http.retries import RetryPolicy
from asyncshard.stores.s3.reader import S3Reader, Target
from asyncshard.stores.scatter import Scatter

DATA = bytes(range(100))
PIN = Pin('"etag"', 100)
POLICY = RetryPolicy(max_attempts=3, deadline_s=60, first_pause_s=0, longest_pause_s=0)
CUT = Failure("the connection was closed", action=Action.RETRY, status=None, request_id="id-7")
EXPIRED = Failure("the token has expired", action=Action.REFRESH_CREDENTIALS, kind=AccessDeniedError)


class Server:
    """The client and the transport of a reader: it holds one object, and fails as `script` says, one entry a request.

    An entry is a `Failure`; a number of bytes after which the body is cut; or None for a right answer, which every
    request gets when the script has ended.
    """

    def __init__(self, *script, data=DATA, etag=PIN.etag):
        self.script = list(script)
        self.data, self.etag = data, etag
        self.requests = []
        self.remedies = []
        self.generation = 0
        self.is_closed = False

    # The client

    async def start(self):
        pass

    async def head(self, key):
        return Pin(self.etag, len(self.data)), {}

    async def list_page(self, prefix, token):
        number = int(token or 0)
        return [f"{prefix}{number}"], str(number + 1) if number < 2 else None

    async def remedy(self, failure, generation):
        self.remedies.append((failure.action, generation))
        self.generation += 1

    # The transport

    async def get(self, key, headers, receive):
        start, stop = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        self.requests.append((start, stop + 1, headers.get("If-Match")))
        entry = self.script.pop(0) if self.script else None
        if isinstance(entry, Failure):
            raise Failed(entry)
        if not self.data:
            return Response(ResponseHead(416, {}), b"")
        body = self.data[start : stop + 1]
        fields = {"etag": self.etag, "content-length": str(len(body))}
        head = ResponseHead(206, fields | {"content-range": f"bytes {start}-{start + len(body) - 1}/{len(self.data)}"})
        scatter = receive(head)
        scatter.write(memoryview(body)[:entry])
        if entry is not None:
            raise Failed(CUT)
        return Response(head, b"")

    async def aclose(self):
        self.is_closed = True


@contextlib.asynccontextmanager
async def reader_of(server, *, policy=POLICY):
    """Yield a reader and the events that it reports."""
    events = []
    reader = S3Reader(server, lambda: server, "bucket", policy, events.append, max_workers=2, integrity=None)
    yield reader, events
    await reader.aclose()
    assert server.is_closed


async def read(reader, start, stop):
    memory = bytearray(stop - start)
    await reader.read("key", PIN, start, Scatter([memoryview(memory)]))
    return bytes(memory)


async def test_an_object_is_pinned_by_its_first_response():
    server = Server()
    async with reader_of(server) as (reader, events):
        assert await reader.open("key", 10) == (PIN, DATA[:10])
        assert await read(reader, 20, 30) == DATA[20:30]
    assert server.requests == [(0, 10, None), (20, 30, PIN.etag)]
    assert events == []


@pytest.mark.parametrize(("nbytes", "first"), [(0, b""), (1, DATA[:1]), (1000, DATA)])
async def test_an_opening_gives_as_many_bytes_as_there_are(nbytes, first):
    async with reader_of(Server()) as (reader, _):
        assert await reader.open("key", nbytes) == (PIN, first)


async def test_an_empty_object_has_a_pin_and_no_bytes():
    async with reader_of(Server(data=b"")) as (reader, _):
        assert await reader.open("key", 10) == (Pin(PIN.etag, 0), b"")


async def test_a_cut_body_goes_on_behind_the_bytes_that_came():
    server = Server(30, 15)
    async with reader_of(server) as (reader, events):
        assert await read(reader, 10, 90) == DATA[10:90]
    assert [request[:2] for request in server.requests] == [(10, 90), (40, 90), (55, 90)]
    assert [(event.attempt, event.reason) for event in events] == [(1, CUT.reason), (2, CUT.reason)]


async def test_attempts_that_bring_bytes_are_not_counted():
    server = Server(*[1] * 50)
    async with reader_of(server) as (reader, _):
        assert await read(reader, 0, 100) == DATA
    assert len(server.requests) == 51


async def test_attempts_that_bring_nothing_end_in_an_error_with_the_facts_of_the_last():
    failure = Failure("slow down", action=Action.RETRY, kind=ThrottledError, status=503, request_id="id-7")
    server = Server(*[failure] * 9)
    async with reader_of(server) as (reader, events):
        with pytest.raises(ThrottledError, match=r"slow down \(bytes 0-100, 3 attempts, request id id-7\)") as caught:
            await read(reader, 0, 100)
    error = caught.value
    assert (error.bucket, error.key, error.start, error.stop) == ("bucket", "key", 0, 100)
    assert (error.status, error.request_id, error.attempts, error.retryable) == (503, "id-7", 3, True)
    assert events == [Retried("s3://bucket/key", "slow down", 0.0, attempt, 503, "id-7") for attempt in (1, 2)]


async def test_what_no_retry_helps_is_asked_once():
    server = Server(Failure("denied", kind=AccessDeniedError, status=403))
    async with reader_of(server) as (reader, _):
        with pytest.raises(AccessDeniedError, match="denied") as caught:
            await read(reader, 0, 100)
    assert (len(server.requests), caught.value.retryable) == (1, False)


async def test_a_remedy_is_applied_once_and_the_request_made_again():
    server = Server(EXPIRED)
    async with reader_of(server) as (reader, _):
        assert await read(reader, 0, 100) == DATA
        assert server.remedies == [(Action.REFRESH_CREDENTIALS, 0)]
        server.script = [EXPIRED, EXPIRED]
        with pytest.raises(AccessDeniedError, match="the token has expired"):
            await read(reader, 0, 100)
    assert server.remedies == [(Action.REFRESH_CREDENTIALS, 0), (Action.REFRESH_CREDENTIALS, 1)]


async def test_a_remedy_that_fails_is_the_error_of_the_request():
    server = Server(EXPIRED)

    async def fail(failure, generation):
        raise Failed(Failure("there are no credentials", kind=AccessDeniedError))

    server.remedy = fail
    async with reader_of(server) as (reader, _):
        with pytest.raises(AccessDeniedError, match="there are no credentials"):
            await read(reader, 0, 100)


async def test_an_object_that_was_replaced_is_not_read_on():
    server = Server(etag='"other"')
    async with reader_of(server) as (reader, _):
        with pytest.raises(ObjectChangedError, match=r's3://bucket/key.*"etag" and is now "other"'):
            await read(reader, 0, 100)
    assert len(server.requests) == 1


async def test_no_pause_goes_beyond_the_deadline():
    policy = dataclasses.replace(POLICY, deadline_s=5)
    server = Server(Failure("busy", action=Action.RETRY, kind=StoreTimeoutError, retry_after_s=3600))
    async with reader_of(server, policy=policy) as (reader, events):
        with pytest.raises(StoreTimeoutError, match="busy"):
            await read(reader, 0, 100)
    assert events == []


async def test_no_bytes_are_no_request():
    server = Server()
    async with reader_of(server) as (reader, _):
        assert await read(reader, 5, 5) == b""
    assert server.requests == []


async def test_a_listing_has_the_names_of_all_its_pages():
    async with reader_of(Server()) as (reader, _):
        assert await reader.list_names("p/") == ["p/0", "p/1", "p/2"]


def test_an_error_names_the_object_and_only_the_facts_that_there_are():
    error = Target("bucket", "prefix/").error(Failure("it failed"), 1)
    assert type(error) is StoreError
    assert str(error) == "s3://bucket/prefix/: it failed"
    assert str(Target("bucket", "a", 1000, 5000).error(CUT, 1)) == (
        "s3://bucket/a: the connection was closed (bytes 1,000-5,000, request id id-7)"
    )
