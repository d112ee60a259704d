"""The S3 server of `asyncshard.testing`: its right answers, and every scripted error. Also tests `s3_connection`."""

import asyncio
import hashlib
import ssl
import xml.etree.ElementTree as ElementTree
from contextlib import asynccontextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import quote, unquote_plus, urlsplit

import httpx
import pytest

from asyncshard.testing import S3Fault, S3Server

DATA = bytes(range(256)) * 4
SIZE = len(DATA)
ETAG = f'"{hashlib.md5(DATA).hexdigest()}"'


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    @property
    def xml(self):
        """Elements by name, without their namespace: their texts, in order."""
        found = {}
        for element in ElementTree.fromstring(self.body).iter():
            found.setdefault(element.tag.rpartition("}")[2], []).append(element.text or "")
        return found

    @property
    def code(self):
        return self.xml["Code"][0]


class Client:
    """One connection, which hides nothing."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    def send(self, target, *, method="GET", body=b"", version="1.1", **headers):
        lines = [f"{method} {target} HTTP/{version}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def head(self):
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        return int(first.split()[1]), headers

    async def receive(self, *, method="GET"):
        status, headers = await self.head()
        if method == "HEAD":
            return Answer(status, headers, b"", True)
        body, is_whole = b"", True
        try:
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
        except asyncio.IncompleteReadError as error:
            body += error.partial
            is_whole = False
        return Answer(status, headers, body, is_whole)

    async def ask(self, target="/models/a.bin", *, method="GET", **options):
        self.send(target, method=method, **options)
        return await self.receive(method=method)

    async def rest(self):
        """What comes until the server closes the connection."""
        return await self.reader.read()


@asynccontextmanager
async def connected(server, context=None):
    url = urlsplit(server.endpoint_url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port, ssl=context)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def served(*faults, **options):
    """A server with one object, and a client."""
    async with S3Server(**options) as server:
        server.put("models", "a.bin", DATA)
        server.faults += faults
        async with connected(server) as client:
            yield server, client


# --- the right answers


async def test_an_object_is_served_whole():
    async with served() as (server, client):
        answer = await client.ask()
        assert (answer.status, answer.body) == (200, DATA)
        assert answer.headers["etag"] == ETAG
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["x-amz-request-id"]
        assert parsedate_to_datetime(answer.headers["last-modified"]) <= parsedate_to_datetime(answer.headers["date"])
        assert server.bytes_sent == SIZE


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("10-99", 10, 100),
        ("1000-", 1000, SIZE),
        ("-24", SIZE - 24, SIZE),
        ("-5000", 0, SIZE),
        ("1000-99999", 1000, SIZE),
    ],
)
async def test_a_range_is_served_and_named(asked, start, stop):
    async with served() as (_, client):
        answer = await client.ask(Range=f"bytes={asked}")
    assert (answer.status, answer.body) == (206, DATA[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "items=0-1", "bytes=5-4", "bytes=-", "bytes=a-b"])
async def test_a_range_that_it_does_not_understand_is_ignored(asked):
    async with served() as (server, client):
        answer = await client.ask(Range=asked)
        assert (answer.status, answer.body) == (200, DATA)
        assert server.requests[0].byte_range is None


@pytest.mark.parametrize("asked", [f"{SIZE}-", f"{SIZE}-{SIZE + 5}", "-0"])
async def test_a_range_past_the_end_is_an_error_that_tells_the_size(asked):
    async with served() as (_, client):
        answer = await client.ask(Range=f"bytes={asked}")
    assert (answer.status, answer.code) == (416, "InvalidRange")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_an_empty_object_has_no_range():
    async with served() as (server, client):
        server.put("models", "empty", b"")
        assert (await client.ask("/models/empty")).body == b""
        assert (await client.ask("/models/empty", Range="bytes=0-9")).status == 416


async def test_another_etag_than_asked_for_is_a_failed_precondition():
    async with served() as (server, client):
        assert (await client.ask(If_Match=ETAG)).status == 200
        assert (await client.ask(If_Match=f'"x", {ETAG}')).status == 200
        assert (await client.ask(If_Match="*")).status == 200
        assert server.put("models", "a.bin", b"other", etag="abc-2") == '"abc-2"'
        answer = await client.ask(If_Match=ETAG, Range="bytes=0-1")
        assert (answer.status, answer.code) == (412, "PreconditionFailed")
        assert (await client.ask(If_Match='"abc-2"')).body == b"other"


async def test_a_missing_object_or_bucket_is_an_error_that_names_it():
    async with served() as (server, client):
        answer = await client.ask("/models/absent")
        assert (answer.status, answer.code, answer.xml["Key"]) == (404, "NoSuchKey", ["absent"])
        assert answer.xml["RequestId"] == [answer.headers["x-amz-request-id"]]
        server.remove("models", "a.bin")
        assert (await client.ask()).code == "NoSuchKey"
        answer = await client.ask("/others/a.bin")
        assert (answer.status, answer.code, answer.xml["BucketName"]) == (404, "NoSuchBucket", ["others"])


async def test_head_has_the_headers_of_get_and_no_body():
    async with served() as (_, client):
        answer = await client.ask(method="HEAD")
        assert (answer.status, answer.headers["content-length"], answer.headers["etag"]) == (200, str(SIZE), ETAG)
        assert (await client.ask("/models/absent", method="HEAD")).status == 404
        assert (await client.ask("/models", method="HEAD")).headers["x-amz-bucket-region"] == "us-east-1"
        assert (await client.ask("/others", method="HEAD")).status == 404
        assert (await client.ask()).body == DATA  # nothing was left on the connection


@pytest.mark.parametrize(("region", "told"), [("us-east-1", ""), ("eu-west-1", "eu-west-1")])
async def test_a_bucket_tells_its_location(region, told):
    async with served(region=region) as (_, client):
        assert (await client.ask("/models?location")).xml == {"LocationConstraint": [told]}


async def test_stored_headers_are_sent_and_checksums_only_with_a_whole_object_on_demand():
    async with served() as (server, client):
        checksum = {"x-amz-checksum-crc32": "AAAAAA==", "x-amz-checksum-type": "FULL_OBJECT"}
        server.put("models", "b.bin", DATA, headers={"x-amz-version-id": "7"} | checksum)
        plain = (await client.ask("/models/b.bin")).headers
        assert plain["x-amz-version-id"] == "7"
        assert not checksum.keys() & plain.keys()
        asked = (await client.ask("/models/b.bin", x_amz_checksum_mode="ENABLED")).headers
        assert checksum.items() <= asked.items()
        ranged = (await client.ask("/models/b.bin", x_amz_checksum_mode="ENABLED", Range="bytes=0-9")).headers
        assert not checksum.keys() & ranged.keys()


async def test_other_methods_and_calls_are_refused_and_leave_the_connection_usable():
    async with served() as (server, client):
        answer = await client.ask(method="PUT", body=b"x" * 100_000, Content_Length=100_000)
        assert (answer.status, answer.code) == (405, "MethodNotAllowed")
        assert (await client.ask("/")).status == 501
        assert (await client.ask("/models?acl")).status == 501
        assert (await client.ask()).status == 200
        assert server.connections_made == 1


async def test_a_body_that_waits_for_permission_gets_it():
    async with served() as (_, client):
        client.send("/models/a.bin", method="PUT", Content_Length=3, Expect="100-continue")
        assert (await client.head())[0] == 100
        client.writer.write(b"abc")
        assert (await client.receive()).status == 405


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"GET /models/a.bin HTTP/2.0\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"PUT /models/a.bin HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_answered_and_the_connection_closed(sent):
    async with served() as (server, client):
        client.writer.write(sent)
        assert (await client.receive()).status == 400
        assert await client.rest() == b""
        assert server.requests == []


# --- listings


async def pages(client, target):
    """Keys and common prefixes, page by page."""
    token, found = "", []
    while True:
        answer = await client.ask(target + (f"&continuation-token={quote(token)}" if token else ""))
        assert answer.status == 200
        xml = answer.xml
        keys, prefixes = xml.get("Key", []), xml.get("Prefix", [])[1:]
        assert int(xml["KeyCount"][0]) == len(keys) + len(prefixes)
        found.append(keys + prefixes)
        if xml["IsTruncated"] == ["false"]:
            return found
        (token,) = xml["NextContinuationToken"]


KEYS = ["a", "b/1", "b/2", "b/c/3", "d&<e>", "é f+g"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [["a", "b/1"], ["b/2", "b/c/3"], ["d&<e>", "é f+g"]]),
        ("&max-keys=1&prefix=b/", [["b/1"], ["b/2"], ["b/c/3"]]),
        ("&max-keys=1000&prefix=b/", [["b/1", "b/2"], ["b/c/3"]]),
        ("&delimiter=/", [["a", "b/"], ["d&<e>", "é f+g"]]),
        ("&delimiter=/&prefix=b/&max-keys=1", [["b/1"], ["b/2"], ["b/c/"]]),
        ("&start-after=b/2", [["b/c/3", "d&<e>"], ["é f+g"]]),
        ("&prefix=absent", [[]]),
        ("&max-keys=0", [[]]),
    ],
)
async def test_listings_come_sorted_and_in_pages(query, expected):
    async with S3Server(max_keys=2) as server, connected(server) as client:
        for key in reversed(KEYS):
            server.put("models", key, b"x")
        assert await pages(client, f"/models?list-type=2{query}") == expected


async def test_a_listing_tells_size_etag_and_date():
    async with served(clock=lambda: 0.0) as (_, client):
        xml = (await client.ask("/models?list-type=2")).xml
    assert (xml["Size"], xml["ETag"], xml["LastModified"]) == ([str(SIZE)], [ETAG], ["1970-01-01T00:00:00.000Z"])


async def test_keys_are_encoded_on_demand():
    async with S3Server() as server, connected(server) as client:
        server.put("models", "é f+g/\x01", b"x")
        xml = (await client.ask("/models?list-type=2&encoding-type=url")).xml
    assert xml["Key"] == ["%C3%A9+f%2Bg/%01"]
    assert unquote_plus(xml["Key"][0]) == "é f+g/\x01"


@pytest.mark.parametrize("query", ["max-keys=many", "continuation-token=%C3%A9", "continuation-token=abc"])
async def test_a_listing_with_wrong_arguments_is_an_error(query):
    async with served() as (_, client):
        answer = await client.ask(f"/models?list-type=2&{query}")
    assert (answer.status, answer.code) == (400, "InvalidArgument")


# --- requests and connections


async def test_requests_are_logged_as_they_were_sent():
    async with served() as (server, client):
        await client.ask("/models/a%20b%2Fc+d?versionId=&x=1%202", Range="bytes=3-9", Authorization="AWS4-HMAC ...")
        await client.ask("/models/a.bin?X-Amz-Signature=abc", Range="bytes=-10")
        await client.ask("/models/absent", Range="bytes=-10")
        await client.ask("/models?list-type=2", Range="bytes=7-")
        first, second, third, fourth = server.requests
    assert (first.method, first.path, first.bucket, first.key) == ("GET", "/models/a b/c+d", "models", "a b/c+d")
    assert (first.query, first.byte_range, first.is_signed) == ({"versionId": "", "x": "1 2"}, (3, 10), True)
    assert first.headers == {"range": "bytes=3-9", "authorization": "AWS4-HMAC ..."}
    assert (second.byte_range, second.is_signed) == ((SIZE - 10, SIZE), True)
    assert (third.byte_range, third.is_signed) == (None, False)
    assert (fourth.byte_range, fourth.key) == ((7, None), "")


@pytest.mark.parametrize(
    ("host", "target", "bucket"),
    [
        ("models.localhost:80", "/a.bin", "models"),
        ("models.s3.example.com", "/a.bin", "models"),
        ("my.models.s3.example.com", "/a.bin", "my.models"),
        ("absent.localhost", "/a.bin", "absent"),
        ("s3.example.com", "/models/a.bin", "models"),
        ("localhost:80", "/models/a.bin", "models"),
        ("127.0.0.1:80", "/models/a.bin", "models"),
        ("[::1]:80", "/models/a.bin", "models"),
    ],
)
async def test_the_bucket_is_in_the_host_or_in_the_path(host, target, bucket):
    async with S3Server(buckets=["models", "my", "my.models"]) as server, connected(server) as client:
        await client.ask(target, Host=host)
        assert [(request.bucket, request.key) for request in server.requests] == [(bucket, "a.bin")]


async def test_a_connection_carries_many_requests():
    async with served() as (server, client):
        for _ in range(3):
            client.send("/models/a.bin", Range="bytes=0-9")  # all at once
        assert [(await client.receive()).body for _ in range(3)] == [DATA[:10]] * 3
        async with connected(server) as other:
            await other.ask()
        assert [request.connection for request in server.requests] == [0, 0, 0, 1]
        await server.until(lambda: server.connections_open == 1)
        assert server.connections_made == 2


@pytest.mark.parametrize("options", [{"version": "1.0"}, {"Connection": "close"}])
async def test_a_connection_is_closed_after_the_last_request(options):
    async with served() as (server, client):
        answer = await client.ask(**options)
        assert (answer.body, answer.headers["connection"]) == (DATA, "close")
        assert await client.rest() == b""
        await server.until(lambda: server.connections_open == 0)


async def test_large_bodies_arrive_whole_and_only_as_fast_as_they_are_read():
    data = bytes(range(256)) * (1 << 16)
    async with S3Server() as server, connected(server) as client:
        server.put("models", "large", data)
        client.send("/models/large")
        await server.until(lambda: server.bytes_sent > 0)
        assert server.bytes_sent < len(data)
        assert (await client.receive()).body == data
        assert server.bytes_sent == len(data)


async def test_until_waits_for_requests_bytes_and_connections():
    async with S3Server() as server:
        server.put("models", "a.bin", DATA)
        seen = asyncio.gather(
            server.until(lambda: server.connections_made == 1),
            server.until(lambda: len(server.requests) == 1),
            server.until(lambda: server.bytes_sent == SIZE),
        )
        async with connected(server) as client:
            await client.ask()
            await seen
        await server.until(lambda: server.connections_open == 0)


async def test_the_clock_sets_the_date():
    async with served(clock=lambda: 86400.0) as (_, client):
        assert (await client.ask()).headers["date"] == "Fri, 02 Jan 1970 00:00:00 GMT"


async def test_latency_delays_every_answer():
    async with served(latency_s=1e-6) as (_, client):
        assert (await client.ask()).body == DATA


async def test_closing_ends_whatever_connections_do():
    async with S3Server() as server:
        server.put("models", "a.bin", DATA)
        server.put("models", "large", bytes(1 << 26))
        server.faults += [
            S3Fault(when=lambda request: request.key == "hang", hang=True),
            S3Fault(when=lambda request: request.key == "stall", stall_after=0),
            S3Fault(when=lambda request: request.key == "gate", before=asyncio.Event().wait),
            S3Fault(when=lambda request: request.key == "late", delay_s=1000),
        ]
        names = ["hang", "stall", "gate", "late", "large", "a.bin"]
        clients = [connected(server) for _ in names]
        opened = [await client.__aenter__() for client in clients]
        for name, client in zip(names, opened, strict=True):
            client.send(f"/models/{name}")
        await server.until(lambda: len(server.requests) == len(names) and server.bytes_sent > SIZE)
        async with connected(server):  # accepted or not
            await server.aclose()
        assert server.connections_open == 0
        await server.aclose()
        for client in clients:
            await client.__aexit__(None, None, None)


async def test_a_server_starts_once():
    async with S3Server() as server:
        with pytest.raises(RuntimeError):
            await server.start()


@pytest.mark.parametrize("field", ["when", "before", "awaited"])
async def test_an_error_in_a_script_is_raised_from_until_and_from_closing(field):
    def fail(*_):
        raise LookupError("a mistake in the test")

    async def fail_later():
        fail()

    server = S3Server()
    await server.start()
    server.faults.append(S3Fault(before=fail_later) if field == "awaited" else S3Fault(**{field: fail}))
    async with connected(server) as client:
        client.send("/models/a.bin")
        assert await client.rest() == b""
        with pytest.raises(LookupError):
            await server.until(lambda: False)
    with pytest.raises(LookupError):
        await server.aclose()


async def test_a_stock_client_gets_along_with_it():
    async with S3Server() as server, httpx.AsyncClient(base_url=server.endpoint_url, trust_env=False) as client:
        server.put("models", "a.bin", DATA)
        assert (await client.get("/models/a.bin", headers={"Range": "bytes=1-9"})).content == DATA[1:10]
        assert (await client.get("/models?list-type=2")).status_code == 200
        assert (await client.put("/models/b.bin", content=DATA)).status_code == 405
        assert (await client.head("/models/a.bin")).headers["content-length"] == str(SIZE)
        assert server.connections_made == 1


# --- TLS


async def test_it_serves_over_tls(tls):
    async with S3Server(tls=tls.server_context) as server:
        context = ssl.create_default_context(cafile=tls.ca_path)
        server.put("models", "a.bin", DATA * 1000)
        server.faults.append(S3Fault(skip=1, times=1, cut_after=100_000))
        async with connected(server, context) as client:
            assert (await client.ask()).body == DATA * 1000
            answer = await client.ask(Range="bytes=0-199999")
            assert (answer.body, answer.is_whole) == ((DATA * 1000)[:100_000], False)
        assert server.endpoint_url.startswith("https://")


async def test_a_client_that_speaks_no_tls_or_trusts_nobody_is_let_go(tls):
    async with S3Server(tls=tls.server_context) as server:
        async with connected(server) as client:
            client.send("/models/a.bin")
            await client.rest()
        with pytest.raises(ssl.SSLCertVerificationError):
            async with connected(server, ssl.create_default_context()):
                pass
        await server.until(lambda: server.connections_made == 2 and server.connections_open == 0)
        async with connected(server):  # which never begins its handshake
            await server.until(lambda: server.connections_open == 1)
            await server.aclose()


# --- which requests go wrong


async def test_a_fault_takes_one_request_unless_told_otherwise():
    async with served(S3Fault(status=503)) as (_, client):
        assert [(await client.ask()).status for _ in range(3)] == [503, 200, 200]
    async with served(S3Fault(status=503, times=2, skip=1)) as (_, client):
        assert [(await client.ask()).status for _ in range(4)] == [200, 503, 503, 200]
    async with served(S3Fault(status=503, times=None)) as (_, client):
        assert [(await client.ask()).status for _ in range(4)] == [503] * 4


async def test_the_first_fault_that_takes_a_request_is_used():
    faults = [
        S3Fault(status=500, when=lambda request: request.byte_range is not None, skip=1),
        S3Fault(status=503, times=2),
    ]
    async with served(*faults) as (server, client):
        statuses = [(await client.ask(Range="bytes=0-9")).status for _ in range(4)]
        assert statuses == [503, 500, 503, 206]
        assert [fault.times for fault in server.faults] == [0, 0]


# --- in place of the answer


@pytest.mark.parametrize(
    ("status", "code"), [(503, "SlowDown"), (500, "InternalError"), (403, "AccessDenied"), (307, "TemporaryRedirect")]
)
async def test_an_error_has_a_code_a_message_and_ids(status, code):
    fault = S3Fault(
        status=status, message="Please <wait>", headers={"Location": "http://example.com/", "Retry-After": "1"}
    )
    async with served(fault) as (_, client):
        answer = await client.ask()
        assert (answer.status, answer.code, answer.xml["Message"]) == (status, code, ["Please <wait>"])
        assert answer.xml["RequestId"] == [answer.headers["x-amz-request-id"]]
        assert answer.xml["HostId"] == [answer.headers["x-amz-id-2"]]
        assert (answer.headers["location"], answer.headers["retry-after"]) == ("http://example.com/", "1")
        assert (await client.ask()).status == 200


async def test_an_error_may_have_any_code_or_status_and_none_has_a_body_for_head():
    faults = [S3Fault(status=400, code="ExpiredToken"), S3Fault(status=599), S3Fault(status=503), S3Fault(status=304)]
    async with served(*faults) as (_, client):
        assert (await client.ask()).code == "ExpiredToken"
        assert (await client.ask()).status == 599
        assert (await client.ask(method="HEAD")).status == 503
        client.send("/models/a.bin")
        assert (await client.head())[0] == 304
        assert (await client.ask()).body == DATA


async def test_a_refused_request_has_its_connection_reset():
    async with served(S3Fault(refuse=True)) as (server, client):
        with pytest.raises(ConnectionResetError):
            await client.ask()
        await server.until(lambda: server.connections_open == 0)
        assert len(server.requests) == 1


async def test_raw_bytes_are_sent_as_they_are():
    async with served(S3Fault(raw=b"SSH-2.0-OpenSSH\r\n")) as (server, client):
        client.send("/models/a.bin")
        assert await client.rest() == b"SSH-2.0-OpenSSH\r\n"
        await server.until(lambda: server.connections_open == 0)


@pytest.mark.parametrize(
    "fault",
    [
        {"hang": True},
        {"stall_after": 0},
        {"stall_after": 100},
        {"stall_after": 100, "trickle": (60, 0.0)},
        {"delay_s": 1000},
        {"trickle": (1, 1000)},
        {"before": lambda: asyncio.Event().wait()},
    ],
)
async def test_a_request_that_waits_ends_when_its_client_goes(fault):
    async with served(S3Fault(**fault)) as (server, client):
        client.send("/models/a.bin")
        await server.until(lambda: len(server.requests) == 1)
        client.writer.close()
        await server.until(lambda: server.connections_open == 0)


# --- on top of it


async def test_headers_are_set_or_removed_whatever_their_case():
    headers = {"etag": '"other"', "Content-Range": None, "Content-Encoding": "gzip", "x-amz-checksum-crc32": "AAAAAA=="}
    async with served(S3Fault(headers=headers)) as (_, client):
        answer = await client.ask(Range="bytes=0-9")
        assert (answer.status, answer.body, answer.headers["etag"]) == (206, DATA[:10], '"other"')
        assert (answer.headers["content-encoding"], answer.headers["x-amz-checksum-crc32"]) == ("gzip", "AAAAAA==")
        assert "content-range" not in answer.headers
        assert (await client.ask(Range="bytes=0-9")).headers["etag"] == ETAG


async def test_an_announced_end_is_kept():
    async with served(S3Fault(headers={"Connection": "close"})) as (_, client):
        answer = await client.ask()
        assert (answer.body, answer.headers["connection"]) == (DATA, "close")
        assert await client.rest() == b""


async def test_an_end_may_come_unannounced():
    async with served(S3Fault(closes=True)) as (_, client):
        answer = await client.ask()
        assert answer.body == DATA
        assert "connection" not in answer.headers
        assert await client.rest() == b""


async def test_an_answer_without_a_length_ends_with_the_connection():
    async with served(S3Fault(headers={"Content-Length": None})) as (_, client):
        answer = await client.ask()
        assert answer.body == DATA
        assert "content-length" not in answer.headers


async def test_ranges_and_conditions_may_be_ignored():
    async with served(S3Fault(ignores_range=True), S3Fault(ignores_if_match=True)) as (_, client):
        answer = await client.ask(Range="bytes=0-9")
        assert (answer.status, answer.body) == (200, DATA)
        assert "content-range" not in answer.headers
        answer = await client.ask(Range="bytes=0-9", If_Match='"other"')
        assert (answer.status, answer.body) == (206, DATA[:10])


@pytest.mark.parametrize("body", [b"\0" * 10, b"short", b"much too long"])
async def test_the_body_may_be_another(body):
    async with served(S3Fault(body=body)) as (_, client):
        answer = await client.ask(Range="bytes=0-9")
        assert (answer.status, answer.body) == (206, body)
        assert answer.headers["content-range"] == f"bytes 0-9/{SIZE}"
        assert (await client.ask()).body == DATA


@pytest.mark.parametrize("fault", [{}, {"trickle": (100, 0.0)}])
async def test_a_body_may_come_in_chunks(fault):
    async with served(S3Fault(chunked=True, **fault)) as (server, client):
        answer = await client.ask()
        assert (answer.headers["transfer-encoding"], answer.body) == ("chunked", DATA)
        assert "content-length" not in answer.headers
        assert (await client.ask()).body == DATA
        assert server.bytes_sent == 2 * SIZE


async def test_the_length_may_be_wrong():
    async with served(S3Fault(content_length=10), S3Fault(content_length=SIZE + 1, closes=True)) as (server, client):
        assert (await client.ask()).body == DATA[:10]
        async with connected(server) as other:
            answer = await other.ask()
        assert (answer.body, answer.is_whole) == (DATA, False)


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_bytes_may_follow_the_body(is_chunked):
    async with served(S3Fault(surplus=b"surplus", chunked=is_chunked, closes=True)) as (_, client):
        assert (await client.ask()).body == DATA
        assert await client.rest() == b"surplus"


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, 500, SIZE])
async def test_a_body_may_be_cut(nbytes, is_chunked):
    async with served(S3Fault(cut_after=nbytes, chunked=is_chunked)) as (server, client):
        answer = await client.ask()
        assert answer.body == DATA[:nbytes]
        assert answer.is_whole == (nbytes == SIZE and not is_chunked)
        assert await client.rest() == b""
        await server.until(lambda: server.connections_open == 0)
        assert server.bytes_sent == nbytes


async def test_a_cut_may_be_a_reset():
    async with served(S3Fault(cut_after=500, resets=True)) as (_, client):
        with pytest.raises(ConnectionResetError):
            await client.ask()


async def test_a_cut_large_body_arrives_up_to_the_cut():
    data = bytes(range(256)) * (1 << 15)
    async with served(S3Fault(cut_after=5_000_001)) as (server, client):
        server.put("models", "large", data)
        answer = await client.ask("/models/large")
        assert (answer.body, answer.is_whole) == (data[:5_000_001], False)


async def test_a_body_may_stall():
    async with served(S3Fault(stall_after=100)) as (server, client):
        client.send("/models/a.bin")
        assert (await client.head())[1]["content-length"] == str(SIZE)
        assert await client.reader.readexactly(100) == DATA[:100]
        assert (server.bytes_sent, server.connections_open) == (100, 1)


async def test_a_body_may_trickle():
    async with served(S3Fault(trickle=(100, 1e-6))) as (server, client):
        assert (await client.ask()).body == DATA
        assert server.bytes_sent == SIZE


async def test_an_answer_may_be_late():
    async with served(S3Fault(delay_s=1e-6)) as (_, client):
        assert (await client.ask()).body == DATA


async def test_the_object_may_be_replaced_just_before_an_answer():
    async with served() as (server, client):
        server.faults.append(S3Fault(skip=1, before=lambda: server.put("models", "a.bin", b"replaced")))
        assert (await client.ask(If_Match=ETAG)).status == 200
        assert (await client.ask(If_Match=ETAG)).status == 412
        assert (await client.ask(Range="bytes=-5")).body == b"laced"


async def test_an_answer_may_wait_for_the_test():
    gate = asyncio.Event()
    async with served(S3Fault(before=gate.wait)) as (server, client):
        client.send("/models/a.bin")
        async with connected(server) as other:
            assert (await other.ask()).body == DATA  # the first one is still held
            assert server.bytes_sent == SIZE
        gate.set()
        assert (await client.receive()).body == DATA
