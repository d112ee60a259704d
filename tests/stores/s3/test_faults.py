"""Whatever a server does: the right bytes, or a clear error.

Through `S3Store`, these are the tests of its store.py, reader.py, client.py, transports.py and assembly.py, and of
http/exchange.py, http/pool.py and http/failures.py: what is retried and what is not, connections, time limits,
credentials, clocks, regions, certificates and cancelling.
"""

import asyncio
import contextlib
import logging
import random
from datetime import UTC, datetime
from email.utils import formatdate
from functools import partial

import numpy as np
import pytest

import asyncshard
from asyncshard import ShardedStateLoader
from asyncshard.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
)
from asyncshard.events import Retried
from asyncshard.stores.http.retries import RetryPolicy
from asyncshard.stores.s3 import S3Store, assembly
from asyncshard.testing import S3Fault, S3Server, StoreTests

DATA = np.random.default_rng(3).bytes(300_000)
SECRET = "wJalrXUtnFEMI-K7MDENG"
TOKEN = "FwoGZXIvYXdz-session"
KEYS = {
    "aws_access_key_id": "AKIDEXAMPLE",
    "aws_secret_access_key": SECRET,
    "aws_session_token": TOKEN,
    "region_name": "us-east-1",
}


@pytest.fixture(params=["sockets", "aiobotocore"])
def transport(request):
    return request.param


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(assembly, "RetryPolicy", partial(RetryPolicy, first_pause_s=0.001))


@pytest.fixture(params=["http", "https"])
async def server(request):
    tls = request.getfixturevalue("tls") if request.param == "https" else None
    if tls and "transport" in request.fixturenames and request.getfixturevalue("transport") == "aiobotocore":
        pytest.skip("TLS is aiohttp's there")
    async with S3Server(tls=tls and tls.server_context) as server:
        server.ca_path = tls and str(tls.ca_path)
        server.put("models", "checkpoint/a.bin", DATA)
        yield server


def store_on(server, transport="sockets", **options):
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, **KEYS, **options}
    return S3Store("s3://models/checkpoint/", transport=transport, **options)


@contextlib.asynccontextmanager
async def retries_of(store):
    """Collect what a store reports of requests that it makes again."""
    retries = []
    with store.reporting_to(lambda event: retries.append(event) if isinstance(event, Retried) else None):
        yield retries


def of_data(request):
    return request.method == "GET" and request.byte_range is not None


def later(request):
    """A read that is not the opening one."""
    return of_data(request) and "if-match" in request.headers


async def read_all(store, start=1000, stop=None):
    """Open the object and read a range of it, which must be right."""
    stop = stop or len(DATA)
    meta, _ = await store.open("a.bin", 10)
    memory = bytearray(stop - start)
    await store.read_into(meta, start, [memoryview(memory)])
    assert memory == DATA[start:stop]
    return store


def sent_ranges(server):
    return [request.byte_range for request in server.requests if later(request)]


class TestOnScriptedServer(StoreTests):
    @pytest.fixture(autouse=True)
    def _server(self, server, transport):
        self.server, self.transport = server, transport

    async def make_store(self, files):
        self.server.remove("models", "checkpoint/a.bin")
        for name, data in files.items():
            self.server.put("models", f"checkpoint/{name}", data)
        return store_on(self.server, self.transport)

    async def replace(self, store, name, data):
        self.server.put("models", f"checkpoint/{name}", data)

    async def remove(self, store, name):
        self.server.remove("models", f"checkpoint/{name}")


# What helps, helps


RECOVERABLE = {
    "a slow-down": {"status": 503, "code": "SlowDown"},
    "a 429": {"status": 429},
    "an internal error": {"status": 500, "code": "InternalError"},
    "a bad gateway": {"status": 502},
    "a gateway's time-out": {"status": 504},
    "a request time-out": {"status": 408},
    "a reset before the answer": {"refuse": True},
    "an end before the answer": {"raw": b""},
    "no HTTP": {"raw": b"\0\1\2\3\r\n\r\n"},
    "half a head": {"raw": b"HTTP/1.1 206 Partial Content\r\nContent-Le"},
    "a cut after nothing": {"cut_after": 0},
    "a cut after a byte": {"cut_after": 1},
    "a cut in the middle": {"cut_after": 150_000},
    "a reset in the middle": {"cut_after": 150_000, "resets": True},
    "a cut before the last byte": {"cut_after": len(DATA) - 1001},
    "an error inside a success": {
        "ignores_range": True,
        "body": b"<Error><Code>SlowDown</Code></Error>",
        "headers": {"Content-Type": "application/xml", "ETag": None},
    },
}


@pytest.mark.parametrize("fault", RECOVERABLE)
@pytest.mark.parametrize("times", [1, 3])
async def test_a_failure_that_passes_is_lived_through(server, transport, fault, times):
    server.faults.append(S3Fault(**RECOVERABLE[fault], times=times, when=later))
    # uvloop does not tell of a reset within TLS: it shows as a body that stalls.
    async with store_on(server, transport, read_timeout_s=1) as store, retries_of(store) as retries:
        await read_all(store)
        # What is left after a cut may be too short for the next; aiohttp itself tries some requests again.
        assert (transport == "sockets") <= len(retries) <= times
    assert server.faults[0].times < times


@pytest.mark.parametrize("fault", ["a slow-down", "a reset before the answer", "a cut after nothing"])
async def test_opening_and_listing_are_tried_again_too(server, transport, fault):
    for when in (of_data, lambda request: request.query.get("list-type") == "2"):
        server.faults.append(S3Fault(**RECOVERABLE[fault], times=2, when=when))
    async with store_on(server, transport) as store, retries_of(store) as retries:
        assert (await store.list()).names == ("a.bin",)
        await read_all(store)
        assert len(retries) <= 4


async def test_a_cut_body_goes_on_from_the_byte_it_had_reached(server, transport):
    server.faults += [S3Fault(cut_after=count, when=later) for count in (100_000, 0, 50_000, 7)]
    async with store_on(server, transport) as store:
        await read_all(store, 1000)
    starts = [start for start, _ in sent_ranges(server)]
    assert starts == sorted(starts)
    assert starts[-1] == 1000 + 100_000 + 50_000 + 7
    connections = [request.connection for request in server.requests if later(request)]
    assert len(set(connections)) == len(connections)


async def test_progress_resets_the_attempts(server, transport):
    server.faults.append(S3Fault(cut_after=10_000, times=12, when=later))
    async with store_on(server, transport, max_attempts=2) as store, retries_of(store) as retries:
        await read_all(store)
        assert len(retries) == 12


async def test_every_later_request_is_pinned(server, transport):
    server.faults.append(S3Fault(cut_after=5, when=later))
    async with store_on(server, transport) as store:
        meta, _ = await store.open("a.bin", 10)
        await read_all(store)
    etag = meta.version.etag
    reads = [request for request in server.requests if of_data(request)]
    assert [request.headers.get("if-match") for request in reads] == [None, None, etag, etag]


# Attempts end


@pytest.mark.parametrize(
    ("fault", "kind", "retryable"),
    [
        ("a slow-down", ThrottledError, True),
        ("an internal error", StoreError, True),
        ("a reset before the answer", StoreError, True),
        ("a cut after nothing", TruncatedError, True),
        ("a gateway's time-out", StoreTimeoutError, True),
    ],
)
async def test_a_failure_that_stays_is_an_error_with_all_the_facts(server, transport, fault, kind, retryable):
    server.faults.append(S3Fault(**RECOVERABLE[fault], times=None, when=later))
    async with store_on(server, transport, max_attempts=3) as store:
        with pytest.raises(kind) as caught:
            await read_all(store)
    error = caught.value
    assert (error.bucket, error.key) == ("models", "checkpoint/a.bin")
    # A reset of a connection that was idle before is no attempt of ours; and aiohttp tries such a request again.
    assert error.attempts in ((3, 4) if fault == "a reset before the answer" else (3,))
    assert (error.start, error.stop, error.retryable) == (1000, len(DATA), retryable)
    assert "s3://models/checkpoint/a.bin" in str(error)
    assert len(sent_ranges(server)) in ((3, 4, 5, 6) if fault == "a reset before the answer" else (3,))


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", AccessDeniedError),
        (403, "InvalidAccessKeyId", AccessDeniedError),
        (403, "SignatureDoesNotMatch", AccessDeniedError),
        (404, "NoSuchKey", ObjectNotFoundError),
        (412, "PreconditionFailed", ObjectChangedError),
        (416, "InvalidRange", TruncatedError),
        (400, "InvalidArgument", StoreError),
    ],
)
async def test_what_no_retry_helps_is_asked_once(server, transport, status, code, kind):
    server.faults.append(S3Fault(status=status, code=code, times=None, when=later))
    async with store_on(server, transport) as store, retries_of(store) as retries:
        with pytest.raises(kind) as caught:
            await read_all(store)
        assert len(retries) == 0
    assert (caught.value.status, caught.value.attempts) == (status, 1)
    assert caught.value.request_id is not None
    assert caught.value.request_id in str(caught.value)
    assert len(sent_ranges(server)) == 1


# Never wrong bytes


NEVER_DATA = {
    "the whole object instead": {"ignores_range": True},
    "no Content-Range": {"headers": {"Content-Range": None}},
    "another range": {"headers": {"Content-Range": f"bytes 0-{len(DATA) - 1001}/{len(DATA)}"}},
    "a wrong length": {"headers": {"Content-Length": str(len(DATA) - 1001)}},
    "an encoding": {"headers": {"Content-Encoding": "gzip"}},
    "no ETag": {"headers": {"ETag": None}},
    "a redirect to nowhere": {"status": 307},
}


@pytest.mark.parametrize("fault", NEVER_DATA)
async def test_an_answer_that_is_not_just_what_was_asked_is_never_data(server, transport, fault):
    server.faults.append(S3Fault(**NEVER_DATA[fault], times=None, when=later))
    async with store_on(server, transport, max_attempts=2) as store:
        meta, _ = await store.open("a.bin", 10)
        memory = bytearray(b"\xaa" * (len(DATA) - 1000))
        with pytest.raises(StoreError):
            await store.read_into(meta, 1000, [memoryview(memory)])
        assert memory == b"\xaa" * len(memory)


@pytest.mark.parametrize("headers", [{"ETag": '"other"'}, {"Content-Range": f"bytes 1000-{len(DATA) - 1}/999999"}])
async def test_an_answer_of_another_object_is_a_change(server, transport, headers):
    server.faults.append(S3Fault(headers=headers, when=later))
    async with store_on(server, transport) as store:
        with pytest.raises(ObjectChangedError, match="replaced") as caught:
            await read_all(store)
    assert caught.value.retryable


@pytest.mark.parametrize("honours", [True, False])
async def test_an_object_replaced_in_mid_body_is_a_change(server, transport, honours):
    def replace():
        server.put("models", "checkpoint/a.bin", bytes(len(DATA)))

    server.faults += [
        S3Fault(cut_after=100_000, when=later),
        S3Fault(before=replace, ignores_if_match=not honours, times=1, when=later),
    ]
    async with store_on(server, transport) as store:
        with pytest.raises(ObjectChangedError):
            await read_all(store)


async def test_bytes_after_the_body_are_nobodys_and_the_connection_is_not_used_again(server, transport):
    server.faults.append(S3Fault(surplus=b"HTTP/1.1 206 Partial Content\r\n", times=None, when=later))
    async with store_on(server, transport) as store:
        meta, _ = await store.open("a.bin", 10)
        memory = bytearray(b"\xaa" * 5000)
        for start in range(0, 200_000, 5000):
            await store.read_into(meta, start, [memoryview(memory)[:4000]])
            assert memory == DATA[start : start + 4000] + b"\xaa" * 1000


async def test_a_chunked_body_of_the_right_length_is_data(server, transport):
    server.faults.append(S3Fault(chunked=True, times=None, when=later))
    async with store_on(server, transport) as store:
        await read_all(store)
        await read_all(store, 0, 1)


@pytest.mark.parametrize("count", [len(DATA) - 1001, len(DATA) - 999])
async def test_a_chunked_body_of_another_length_is_not(server, count):
    server.faults.append(S3Fault(chunked=True, body=DATA[1000:] + b"x", times=None, when=later))
    server.faults[0].body = (DATA[1000:] + b"x")[:count]
    async with store_on(server, max_attempts=2) as store:
        with pytest.raises(StoreError):
            await read_all(store)


async def test_an_end_without_a_length_is_no_proof_of_a_whole_body(server):
    server.faults.append(S3Fault(headers={"Content-Length": None}, body=DATA[1000:5000], when=later))
    async with store_on(server) as store, retries_of(store) as retries:
        await read_all(store)
        assert len(retries) == 1


# Connections


async def test_connections_are_kept_and_bounded(server):
    async with store_on(server, max_workers=3) as store:
        meta, _ = await store.open("a.bin", 10)
        memory = bytearray(len(DATA))
        ranges = [(at, memoryview(memory)[at : at + 10_000]) for at in range(0, len(DATA), 10_000)]
        await asyncio.gather(*(store.read_into(meta, start, [buffer]) for start, buffer in ranges))
    assert memory == DATA
    assert len({request.connection for request in server.requests if of_data(request)}) <= 3


async def test_a_connection_that_the_server_closed_while_idle_costs_no_attempt(server):
    server.faults.append(S3Fault(closes=True, times=None, when=of_data))
    async with store_on(server, max_attempts=1) as store:
        for _ in range(5):
            await read_all(store)


async def test_many_reads_over_connections_that_close_are_all_right(server, transport):
    server.faults.append(S3Fault(headers={"Connection": "close"}, times=None, when=of_data))
    async with store_on(server, transport, max_workers=4) as store:
        await asyncio.gather(*(read_all(store, at, at + 5000) for at in range(0, 100_000, 5000)))


async def test_nothing_stays_open_after_closing(server, transport):
    store = store_on(server, transport)
    await asyncio.gather(*(read_all(store) for _ in range(5)))
    await store.aclose()
    await server.until(lambda: server.connections_open == 0)


async def test_a_cancelled_close_closes_all_the_same(server, transport):
    store = store_on(server, transport)
    await read_all(store)
    closing = asyncio.ensure_future(store.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await server.until(lambda: server.connections_open == 0)


# Time


async def test_a_server_that_never_answers_is_left(server, transport):
    server.faults.append(S3Fault(hang=True, when=later))
    async with store_on(server, transport, read_timeout_s=0.2) as store, retries_of(store) as retries:
        await read_all(store)
        assert len(retries) == 1


async def test_a_body_that_stalls_is_resumed(server, transport):
    server.faults.append(S3Fault(stall_after=100_000, when=later))
    async with store_on(server, transport, read_timeout_s=0.2) as store:
        await read_all(store)
    assert sent_ranges(server)[-1] == (101_000, len(DATA))


async def test_a_trickle_is_resumed(server, transport, monkeypatch):
    monkeypatch.setattr(assembly, "_SLOW_WINDOW_S", 0.3)
    server.faults.append(S3Fault(trickle=(10, 0.01), when=later))
    async with store_on(server, transport) as store, retries_of(store) as retries:
        await read_all(store)
        assert len(retries) == 1
    assert 1000 < sent_ranges(server)[-1][0] < 2000


async def test_the_deadline_ends_it_all(server, transport):
    server.faults.append(S3Fault(hang=True, times=None, when=later))
    async with store_on(server, transport, deadline_s=0.3) as store:
        with pytest.raises(StoreTimeoutError, match="deadline_s"):
            await read_all(store)


async def test_the_deadline_does_not_count_the_wait_for_a_turn(server):
    held = asyncio.Event()
    server.faults.append(S3Fault(before=held.wait, when=later))
    async with store_on(server, max_workers=1, deadline_s=5) as store:
        first, second = (asyncio.ensure_future(read_all(store)) for _ in range(2))
        await server.until(lambda: any(map(later, server.requests)))
        held.set()
        await asyncio.gather(first, second)


# Credentials, clocks, regions, redirects


async def test_expired_credentials_are_looked_for_anew_once_for_all(server, transport):
    expired = set()
    server.faults.append(
        S3Fault(
            status=403,
            code="ExpiredToken",
            times=None,
            when=lambda request: later(request) and (not expired or request.connection in expired),
            before=lambda: expired.add(-1),
        )
    )
    async with store_on(server, transport) as store, retries_of(store) as retries:
        await read_all(store)
        assert len(retries) == 1


async def test_credentials_are_changed_under_requests_in_flight(server, transport):
    server.faults.append(S3Fault(status=403, code="ExpiredToken", times=4, skip=4, when=later))
    async with store_on(server, transport, max_workers=8) as store, retries_of(store) as retries:
        await asyncio.gather(*(read_all(store, at, at + 4000) for at in range(0, 200_000, 4000)))
        assert len(retries) == 4
        assert store._reader._client.generation <= 4


async def test_credentials_that_stay_expired_are_an_error(server, transport):
    server.faults.append(S3Fault(status=403, code="ExpiredToken", times=None, when=later))
    async with store_on(server, transport) as store:
        with pytest.raises(AccessDeniedError, match="expired"):
            await read_all(store)
    assert len(sent_ranges(server)) == 2


async def test_a_file_of_credentials_that_was_rewritten_is_read_anew(server, transport, tmp_path, monkeypatch):
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    path.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = x\n")

    def rewrite():
        path.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = x\n")

    server.faults.append(S3Fault(status=403, code="ExpiredToken", when=later, before=rewrite))
    options = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"))
    async with store_on(server, transport, **options) as store:
        await read_all(store)
    used = [
        request.query.get("X-Amz-Credential", request.headers.get("authorization", ""))
        for request in server.requests
        if later(request)
    ]
    assert ["OLD/" in used[0], "NEW/" in used[1]] == [True, True]


@pytest.mark.parametrize("plane", ["data", "control"])
async def test_a_wrong_clock_is_corrected_by_the_servers(server, transport, plane):
    when = later if plane == "data" else (lambda request: "list-type" in request.query)
    moment = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
    date = formatdate(moment.timestamp(), usegmt=True)
    server.faults.append(S3Fault(status=403, code="RequestTimeTooSkewed", headers={"Date": date}, when=when))
    async with store_on(server, transport) as store:
        await store.list()
        await read_all(store)
    last = [request for request in server.requests if when(request)][-1]
    assert last.is_signed
    signed_at = last.query.get("X-Amz-Date") or last.headers["x-amz-date"]
    assert signed_at.startswith("20310506T0708")


async def test_the_corrected_signature_is_one_that_a_server_takes(seaweed, prefix):
    url = seaweed.put_all(prefix, {"a.bin": DATA})
    async with S3Store(url, **seaweed.storage_options) as store:
        await store.open("a.bin", 1)
        client = store._reader._client
        client._clock_offset_s = 1.0

        async def renew():
            await client._make()
            client.urls.forget()

        await store._loop.run(renew)
        assert (await store.list()).names == ("a.bin",)
        assert await store.read("a.bin") == DATA


async def test_a_bucket_in_another_region_is_found_there(server, transport):
    moved = {"status": 301, "code": "PermanentRedirect", "headers": {"x-amz-bucket-region": "eu-west-1"}}
    server.faults.append(S3Fault(**moved, when=later))
    async with store_on(server, transport) as store:
        await read_all(store)
    last = server.requests[-1]
    assert "/eu-west-1/s3/" in last.query.get("X-Amz-Credential", last.headers.get("authorization"))


async def test_a_redirect_is_followed_without_credentials(server):
    tls = server.ca_path
    async with S3Server(tls=None) as other:
        other.put("models", "checkpoint/a.bin", DATA)
        location = f"{other.endpoint_url}/models/checkpoint/a.bin"

        def when(request):
            fault.headers = {"Location": f"{location}?{'&'.join(f'{k}={v}' for k, v in request.query.items())}"}
            return later(request)

        fault = S3Fault(status=307, code="TemporaryRedirect", when=when)
        server.faults.append(fault)
        async with store_on(server) as store:
            if tls:
                with pytest.raises(StoreError, match="https to http"):
                    await read_all(store)
                assert not other.requests
                return
            await read_all(store)
        (followed,) = other.requests
        assert followed.byte_range == (1000, len(DATA))
        assert "if-match" in followed.headers
        assert TOKEN not in f"{followed}"
        assert "X-Amz" not in f"{followed}"
        assert not followed.is_signed


async def test_redirects_in_a_circle_end(server):
    server.faults.append(S3Fault(status=307, headers={"Location": "/models/checkpoint/a.bin"}, times=None, when=later))
    async with store_on(server) as store:
        with pytest.raises(StoreError, match="redirects more than"):
            await read_all(store)


class Metadata:
    """A server in place of the one that gives credentials to instances."""

    async def __aenter__(self):
        self.connections = 0
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def _serve(self, _reader, writer):
        self.connections += 1
        writer.close()

    async def __aexit__(self, *_):
        self._server.close()
        await self._server.wait_closed()


@pytest.mark.parametrize("options", [{}, {"unsigned": True}])
async def test_with_keys_or_unsigned_nobody_asks_the_instance(server, transport, options, monkeypatch):
    nothing = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"))
    async with Metadata() as metadata:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)
        monkeypatch.setenv("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "1")
        async with store_on(server, transport, **(nothing | options if options else {})) as store:
            await store.list()
            await read_all(store)
        assert metadata.connections == 0
        assert all(request.is_signed is not bool(options) for request in server.requests)
        async with store_on(server, transport, **nothing) as store:  # the test can see it
            with pytest.raises(AccessDeniedError, match="no AWS credentials"):
                await store.list()
        assert metadata.connections > 0


# Errors of the way there


async def test_a_server_that_is_not_there_is_named():
    async with S3Server() as server:
        server.ca_path = None
        gone = server.endpoint_url
    options = {**KEYS, "endpoint_url": gone, "max_attempts": 2}
    async with S3Store("s3://models/checkpoint/", **options) as store:
        with pytest.raises(StoreError, match="endpoint_url") as caught:
            await store.list()
        with pytest.raises(StoreError, match="endpoint_url"):
            await store.open("a.bin", 1)
    assert caught.value.retryable


async def test_a_certificate_of_an_unknown_authority_is_refused(tls, transport):
    async with S3Server(tls=tls.server_context) as server:
        server.ca_path = None
        server.put("models", "checkpoint/a.bin", DATA)
        async with store_on(server, transport) as store:
            for call in (store.list(), store.open("a.bin", 1)):
                with pytest.raises(StoreError, match="verify="):
                    await call
        async with store_on(server, transport, verify=False) as store:
            await read_all(store)


async def test_aws_ca_bundle_counts_on_both_planes(tls, transport, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tls.ca_path))
    async with S3Server(tls=tls.server_context) as server:
        server.ca_path = None
        server.put("models", "checkpoint/a.bin", DATA)
        async with store_on(server, transport) as store:
            await store.list()
            await read_all(store)


async def test_aws_endpoint_url_and_profiles_count(server, transport, tmp_path, monkeypatch):
    (tmp_path / "config").write_text("[profile mine]\nregion = eu-central-1\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = MINE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url.replace("127.0.0.1", "localhost"))
    options = {"verify": server.ca_path, "profile_name": "mine", "transport": transport}
    async with S3Store("s3://models/checkpoint/", **options) as store:
        await store.list()
        await read_all(store)
    assert all(
        "MINE/" in credential and "/eu-central-1/" in credential
        for request in server.requests
        for credential in [request.query.get("X-Amz-Credential") or request.headers["authorization"]]
    )


async def test_a_profile_that_is_not_there_is_named(server):
    nothing = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key", "aws_session_token"))
    async with store_on(server, profile_name="no-such-profile", **nothing) as store:
        with pytest.raises(AccessDeniedError, match="no-such-profile"):
            await store.list()


async def test_a_proxy_chooses_aiobotocore_and_says_so(server, monkeypatch, caplog):
    monkeypatch.setenv("HTTP_PROXY", server.endpoint_url)  # it takes requests for any host
    caplog.set_level(logging.INFO, "asyncshard")
    async with store_on(server, "auto", endpoint_url="http://s3.test.invalid", addressing_style="path") as store:
        with contextlib.suppress(StoreError):
            await store.open("a.bin", 1)
    assert "through aiobotocore, since a proxy is configured" in caplog.text


# Cancelling


async def test_a_cancelled_read_leaves_nothing_and_the_next_is_right(server, transport):
    generator = random.Random(5)
    async with store_on(server, transport, max_workers=4) as store:
        meta, _ = await store.open("a.bin", 10)
        for _ in range(60):
            memory = bytearray(len(DATA))
            sent = server.bytes_sent
            until = sent + generator.randrange(1, 3 * len(DATA))
            reads = [
                asyncio.ensure_future(store.read_into(meta, at, [memoryview(memory)[at : at + 30_000]]))
                for at in range(0, len(DATA), 30_000)
            ]
            together = asyncio.gather(*reads)
            while not together.done() and server.bytes_sent < until and generator.random() < 0.9:  # noqa: ASYNC110
                await asyncio.sleep(0)
            together.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await together
            await asyncio.wait(reads)
            memory[:] = bytes(len(memory))
            await read_all(store)
            assert memory == bytes(len(memory))


@pytest.mark.parametrize(
    "fault", [{"hang": True}, {"stall_after": 1000}, {"status": 503, "headers": {"Retry-After": "60"}}]
)
async def test_a_read_is_cancelled_whatever_it_waits_for(server, transport, fault):
    server.faults.append(S3Fault(**fault, times=None, when=later))
    async with store_on(server, transport) as store:
        read = asyncio.ensure_future(read_all(store))
        await server.until(lambda: any(map(later, server.requests)))
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read


# Loads


async def test_no_message_log_or_repr_shows_a_secret(server, transport, checkpoints, caplog):
    caplog.set_level(logging.DEBUG, "asyncshard")
    for name, data in checkpoints.rank_files(checkpoints.tensors(4)).items():
        server.put("models", f"checkpoint/{name}", data)
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, "transport": transport, **KEYS}
    said = []
    for fault in (*RECOVERABLE.values(), *NEVER_DATA.values(), {"status": 403, "code": "SignatureDoesNotMatch"}):
        server.faults[:] = [S3Fault(**fault, times=None, when=of_data)]
        loader = ShardedStateLoader(storage_options={**options, "max_attempts": 2})
        error = None
        try:
            await loader.load_weights("s3://models/checkpoint")
        except StoreError as caught:
            error = caught
        while error is not None:
            said.append(f"{error!r} {error} {vars(error)}")
            error = error.__cause__ or error.__context__
        said.append(f"{loader!r} {loader.options!r}")
    assert len(said) > 2 * len(RECOVERABLE)
    text = " ".join(said) + caplog.text
    assert not [secret for secret in (SECRET, TOKEN, "AKIDEXAMPLE", "X-Amz-Signature") if secret in text]


async def test_small_tensors_are_read_together(server, checkpoints):
    tensors = checkpoints.tensors(5000, nbytes=64)
    server.put("models", "small/model.safetensors", checkpoints.shard(tensors))
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, **KEYS}
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    await ShardedStateLoader(storage_options=options).load_weights("s3://models/small", state)
    assert checkpoints.same(state, tensors)
    assert len([request for request in server.requests if request.key.startswith("small")]) <= 5


@pytest.mark.parametrize("max_gap_bytes", [0, 1000, None])
async def test_unwanted_tensors_between_wanted_ones_are_read_with_them_where_they_are_small(
    server, checkpoints, max_gap_bytes
):
    tensors = checkpoints.tensors(90, nbytes=800)
    server.put("models", "gaps/model.safetensors", checkpoints.shard(tensors))
    wanted = {name: np.zeros_like(tensor) for name, tensor in list(tensors.items())[::3]}
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, "max_gap_bytes": max_gap_bytes, **KEYS}
    loader = ShardedStateLoader(storage_options=options)
    await loader.load_weights("s3://models/gaps", wanted, strict=False)
    assert checkpoints.same(wanted, {name: tensors[name] for name in wanted})
    assert set(loader.last_report.unexpected) == set(tensors) - set(wanted)
    assert len(sent_ranges(server)) == (1 if max_gap_bytes is None else 30)


async def test_a_load_says_how_often_it_was_tried_again(server, checkpoints):
    server.put("models", "one.safetensors", checkpoints.shard(checkpoints.tensors(4)))
    server.faults.append(S3Fault(status=503, times=2, when=of_data))
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, **KEYS}
    async with asyncshard.stream("s3://models/one.safetensors", storage_options=options) as weights:
        assert [name async for name, _ in weights]
        assert weights.statistics().retries == 2


@pytest.mark.parametrize("in_place", [True, False])
async def test_a_load_that_fails_in_the_middle_leaves_nothing(server, checkpoints, in_place):
    tensors = checkpoints.tensors(30, nbytes=20_000)
    server.put("models", "one.safetensors", checkpoints.shard(tensors))
    server.faults.append(S3Fault(status=404, skip=3, times=None, when=later))
    options = {"endpoint_url": server.endpoint_url, "verify": server.ca_path, **KEYS}
    loader = ShardedStateLoader(storage_options=options, chunk_size=20_032, memory_budget_mb=1)
    state = {name: np.zeros_like(tensor) for name, tensor in tensors.items()} if in_place else None
    with pytest.raises(ObjectNotFoundError) as caught:
        if in_place:
            await loader.load_weights("s3://models/one.safetensors", state)
        else:
            await loader.iterate_weights("s3://models/one.safetensors").drain()
    if in_place:
        assert all(np.array_equal(state[name], tensors[name]) for name in caught.value.filled)
        untouched = set(tensors) - set(caught.value.filled) - set(caught.value.torn)
        assert all(not state[name].any() for name in untouched)
    assert loader.budget.bytes_used == 0
    await server.until(lambda: server.connections_open == 0)
