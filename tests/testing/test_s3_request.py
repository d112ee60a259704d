"""Requests are parsed from bytes, and faults take those that they are meant for."""

import pytest

from asyncshard.testing import S3Fault, S3Request
from asyncshard.testing.s3_request import parse_request, range_of


def parse(text, *, size=100):
    head = text.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n"
    return parse_request(head, connection=3, buckets=["models"], size_of=lambda bucket, key: size)


def request(**values):
    given = {"method": "GET", "path": "/models/a", "query": {}, "headers": {}, "bucket": "models", "key": "a"}
    return S3Request(**{**given, "byte_range": None, "connection": 0, **values})


def test_a_request_in_path_style_has_bucket_key_query_and_headers():
    parsed = parse("GET /models/a%20b/c?list-type=2&location HTTP/1.1\nHost: 127.0.0.1:80\nX-One:  two ")
    assert (parsed.method, parsed.path, parsed.bucket, parsed.key) == ("GET", "/models/a b/c", "models", "a b/c")
    assert parsed.query == {"list-type": "2", "location": ""}
    assert (parsed.headers["x-one"], parsed.connection, parsed.http_version) == ("two", 3, "1.1")


@pytest.mark.parametrize("host", ["models.localhost:80", "models.s3.example"])
def test_a_request_in_virtual_hosted_style_has_its_bucket_in_the_host(host):
    parsed = parse(f"HEAD /a/b HTTP/1.1\nHost: {host}")
    assert (parsed.bucket, parsed.key) == ("models", "a/b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GET",
        "GET models HTTP/1.1",
        "GET /a HTTP/2.0",
        "get /a HTTP/1.1",
        "GET /a HTTP/1.1\nno colon",
        "GET /a HTTP/1.1\nContent-Length: x",
        "GET /a HTTP/1.1\nTransfer-Encoding: chunked",
    ],
)
def test_bytes_that_are_no_request_are_an_error(text):
    with pytest.raises(ValueError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=5-", (5, None)),
        ("bytes=-10", (90, 100)),
        ("bytes=-500", (0, 100)),
        ("bytes=9-5", None),
        ("bytes=0-1,4-5", None),
        ("lines=0-9", None),
        ("", None),
    ],
)
def test_a_range_is_half_open_and_one_that_servers_ignore_is_none(text, expected):
    assert range_of(text, 100) == expected


def test_a_suffix_of_an_object_that_is_not_there_is_no_range():
    assert range_of("bytes=-10", None) is None


def test_signed_and_last_requests_are_told():
    assert not request().is_signed
    assert request(headers={"authorization": "AWS4"}).is_signed
    assert request(query={"X-Amz-Signature": "x"}).is_signed
    assert [request(headers={"connection": value}).is_last for value in ("close", "keep-alive")] == [True, False]
    assert request(http_version="1.0").is_last


def test_a_fault_takes_as_many_requests_as_it_says_after_those_that_it_skips():
    fault = S3Fault(times=2, skip=1, when=lambda request: request.method == "GET")
    assert not fault.takes(request(method="HEAD"))
    assert [fault.takes(request()) for _ in range(4)] == [False, True, True, False]
    assert all(S3Fault(times=None).takes(request()) for _ in range(3))
