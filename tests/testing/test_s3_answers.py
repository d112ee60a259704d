"""Answers are made of what is stored and what is asked. What a client sees of them: test_s3_server.py."""

import pytest

from asyncshard.testing import S3Fault
from asyncshard.testing.s3_answers import S3Object, S3State, answer_to, bad_request
from asyncshard.testing.s3_request import parse_request

DATA = bytes(range(100))


def answer(line, *headers, fault=None, number=1):
    objects = {"a": S3Object(memoryview(DATA), '"etag"', {"x-amz-checksum-crc32": "c", "X-Mine": "1"}, 0.0)}
    head = "\r\n".join([f"{line} HTTP/1.1", "Host: 127.0.0.1", *headers, "", ""]).encode()
    request = parse_request(head, connection=0, buckets=["models"], size_of=lambda bucket, key: 100)
    state = S3State({"models": objects}, 2, "eu-central-1")
    return answer_to(request, fault or S3Fault(), state, number=number, now_s=0.0)


def test_an_object_is_answered_whole_or_by_a_range():
    whole, part = answer("GET /models/a"), answer("GET /models/a", "Range: bytes=10-19")
    assert (whole.status, bytes(whole.body), whole.headers["Content-Length"]) == (200, DATA, "100")
    assert (part.status, bytes(part.body)) == (206, DATA[10:20])
    assert part.headers["Content-Range"] == "bytes 10-19/100"


def test_checksums_come_with_whole_objects_on_demand_and_other_headers_always():
    wanted = "x-amz-checksum-mode: enabled"
    answers = [
        answer("GET /models/a"),
        answer("GET /models/a", wanted),
        answer("GET /models/a", wanted, "Range: bytes=0-0"),
    ]
    assert ["x-amz-checksum-crc32" in each.headers for each in answers] == [False, True, False]
    assert all(each.headers["X-Mine"] == "1" for each in answers)


@pytest.mark.parametrize(
    ("line", "header", "status", "code"),
    [
        ("GET /models/absent", "A: b", 404, "NoSuchKey"),
        ("GET /absent/a", "A: b", 404, "NoSuchBucket"),
        ("PUT /models/a", "A: b", 405, "MethodNotAllowed"),
        ("GET /models/a", "Range: bytes=100-", 416, "InvalidRange"),
        ("GET /models/a", 'If-Match: "other"', 412, "PreconditionFailed"),
        ("GET /models?list-type=1", "A: b", 501, "NotImplemented"),
    ],
)
def test_what_cannot_be_answered_is_an_error_with_a_code(line, header, status, code):
    refused = answer(line, header)
    assert (refused.status, f"<Code>{code}</Code>" in bytes(refused.body).decode()) == (status, True)


def test_a_listing_has_pages_of_at_most_max_keys_and_the_region_is_told():
    listing = bytes(answer("GET /models?list-type=2&prefix=").body).decode()
    assert "<Key>a</Key>" in listing
    assert "<MaxKeys>2</MaxKeys>" in listing
    assert "eu-central-1" in bytes(answer("GET /models?location").body).decode()


def test_a_fault_changes_the_status_the_body_or_the_headers():
    assert answer("GET /models/a", fault=S3Fault(status=503)).status == 503
    other = answer("GET /models/a", fault=S3Fault(body=b"other", headers={"etag": None, "X-Mine": "2"}))
    assert (bytes(other.body), other.headers["Content-Length"], other.headers["X-Mine"]) == (b"other", "5", "2")
    assert "ETag" not in other.headers
    assert answer("GET /models/a", "Range: bytes=0-0", fault=S3Fault(ignores_range=True)).status == 200


def test_an_answer_to_head_has_no_body_and_the_length_of_the_object():
    head = answer("HEAD /models/a")
    assert (bytes(head.body), head.headers["Content-Length"]) == (b"", "100")


def test_the_connection_ends_after_an_answer_without_a_length():
    assert answer("GET /models/a", fault=S3Fault(headers={"Content-Length": None})).is_last
    assert answer("GET /models/a", "Connection: close").is_last
    assert not answer("GET /models/a").is_last


def test_each_request_has_an_id_of_its_own():
    ids = {answer("GET /models/a", number=number).headers["x-amz-request-id"] for number in (1, 2)}
    assert len(ids) == 2


def test_something_that_is_no_request_gets_a_whole_answer():
    head, _, body = bad_request("a line <of> the head").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"&lt;of&gt;" in body
