"""What an answer to a range request means."""

from datetime import UTC, datetime

import pytest

from asyncshard.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
)
from asyncshard.stores.http.failures import Action, Failed
from asyncshard.stores.http.response import Head, Pin, RangeRequest, explain, is_error, require_range

PIN = Pin('"tag"', 100)


def head(status=206, **headers):
    """A right answer to bytes 10-19 of 100, with some headers changed, or with None removed."""
    right = {"etag": '"tag"', "content-range": "bytes 10-19/100", "content-length": "10"}
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Head(status, {name: value for name, value in (right | given).items() if value is not None})


ASKED = RangeRequest(10, 20, PIN)


def test_the_right_answer_is_data():
    assert require_range(head(), ASKED) == (PIN, 10)
    assert require_range(head(content_length=None), ASKED) == (PIN, 10)
    assert require_range(head(content_encoding="identity"), ASKED) == (PIN, 10)


def test_the_first_answer_pins_and_may_be_shorter():
    first = head(content_range="bytes 0-99/100", content_length="100")
    assert require_range(first, RangeRequest(0, 65536, None)) == (PIN, 100)
    with pytest.raises(Failed):
        require_range(first, RangeRequest(0, 65536, PIN))


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({"etag": '"other"'}, ObjectChangedError),
        ({"content_range": "bytes 10-19/101"}, ObjectChangedError),
        ({"etag": None}, StoreError),
        ({"etag": 'W/"tag"'}, StoreError),
        ({"content_range": None}, StoreError),
        ({"content_range": "bytes 10-19/*"}, StoreError),
        ({"content_range": "bytes 11-20/100"}, StoreError),
        ({"content_range": "bytes 10-18/100"}, StoreError),
        ({"content_range": "bytes 10-20/100"}, StoreError),
        ({"content_range": "items 10-19/100"}, StoreError),
        ({"content_length": "9"}, StoreError),
        ({"content_length": "11"}, StoreError),
        ({"content_encoding": "gzip"}, StoreError),
        ({"content_encoding": "aws-chunked"}, StoreError),
    ],
)
def test_anything_else_is_never_data(headers, kind):
    with pytest.raises(Failed) as caught:
        require_range(head(**headers), ASKED)
    assert (caught.value.failure.kind, caught.value.failure.action) == (kind, Action.GIVE_UP)


@pytest.mark.parametrize("status", [200, 203, 204])
def test_another_success_is_not_data(status):
    with pytest.raises(Failed, match="ranges"):
        require_range(head(status), ASKED)


def xml(code, **fields):
    inner = "".join(f"<{name}>{value}</{name}>" for name, value in {"Code": code, **fields}.items())
    return f'<?xml version="1.0"?><Error>{inner}</Error>'.encode()


@pytest.mark.parametrize(
    ("status", "code", "action", "kind"),
    [
        (408, "", Action.RETRY, StoreTimeoutError),
        (429, "", Action.RETRY, ThrottledError),
        (500, "InternalError", Action.RETRY, StoreError),
        (502, "", Action.RETRY, StoreError),
        (503, "SlowDown", Action.RETRY, ThrottledError),
        (503, "", Action.RETRY, ThrottledError),
        (504, "", Action.RETRY, StoreTimeoutError),
        (200, "SlowDown", Action.RETRY, ThrottledError),
        (200, "InternalError", Action.RETRY, StoreError),
        (200, "", Action.GIVE_UP, StoreError),
        (400, "RequestTimeout", Action.RETRY, StoreTimeoutError),
        (400, "InvalidArgument", Action.GIVE_UP, StoreError),
        (400, "ExpiredToken", Action.REFRESH_CREDENTIALS, AccessDeniedError),
        (401, "", Action.GIVE_UP, AccessDeniedError),
        (403, "", Action.GIVE_UP, AccessDeniedError),
        (403, "AccessDenied", Action.GIVE_UP, AccessDeniedError),
        (403, "SignatureDoesNotMatch", Action.GIVE_UP, AccessDeniedError),
        (403, "InvalidAccessKeyId", Action.GIVE_UP, AccessDeniedError),
        (403, "InvalidObjectState", Action.GIVE_UP, AccessDeniedError),
        (403, "ExpiredToken", Action.REFRESH_CREDENTIALS, AccessDeniedError),
        (403, "RequestTimeTooSkewed", Action.CORRECT_CLOCK, AccessDeniedError),
        (301, "PermanentRedirect", Action.GIVE_UP, StoreError),
        (404, "", Action.GIVE_UP, ObjectNotFoundError),
        (404, "NoSuchBucket", Action.GIVE_UP, ObjectNotFoundError),
        (412, "PreconditionFailed", Action.GIVE_UP, ObjectChangedError),
        (416, "InvalidRange", Action.GIVE_UP, TruncatedError),
        (302, "", Action.GIVE_UP, StoreError),
    ],
)
def test_each_error_has_its_family_and_its_remedy(status, code, action, kind):
    failure = explain(Head(status, {"x-amz-request-id": "ID"}), xml(code) if code else b"")
    assert (failure.action, failure.kind, failure.status, failure.request_id) == (action, kind, status, "ID")


def test_the_region_of_a_bucket_is_found_in_the_header_or_in_the_body():
    for answer in (
        (Head(301, {"x-amz-bucket-region": "eu-west-1"}), b""),
        (Head(400, {}), xml("AuthorizationHeaderMalformed", Region="eu-west-1")),
    ):
        failure = explain(*answer)
        assert (failure.action, failure.region) == (Action.CHANGE_REGION, "eu-west-1")


def test_the_time_of_the_server_is_found_in_the_body_or_in_the_header():
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    date = {"date": "Fri, 02 Jan 2026 03:04:05 GMT"}
    for headers, body in (
        (date, xml("RequestTimeTooSkewed")),
        ({}, xml("RequestTimeTooSkewed", ServerTime="2026-01-02T03:04:05Z")),
        (date, xml("RequestTimeTooSkewed", ServerTime="no time")),
    ):
        assert explain(Head(403, headers), body).server_time == moment


@pytest.mark.parametrize("code", ["", "AccessDenied"])
def test_clocks_that_are_far_apart_explain_a_refusal_without_a_code_of_its_own(code):
    body = xml(code, Message="Request has expired") if code else b""
    failure = explain(Head(403, {"date": "Fri, 02 Jan 2006 03:04:05 GMT"}), body)
    assert failure.action is Action.CORRECT_CLOCK


def test_a_presigned_url_that_expired_is_signed_anew():
    failure = explain(Head(403, {}), xml("AccessDenied", Message="Request has expired"))
    assert failure.action is Action.REFRESH_CREDENTIALS


@pytest.mark.parametrize(("text", "seconds"), [("7", 7), ("", 0), ("-1", 0), ("Fri, 02 Jan 2026 03:04:05 GMT", 0)])
def test_the_server_may_ask_for_a_pause(text, seconds):
    assert explain(Head(503, {"retry-after": text}), b"").retry_after_s == seconds


@pytest.mark.parametrize("body", [b"", b"\0", b"<Error>", b"<html><body>502</body></html>", b"\xff\xfe", b"<a/>" * 2])
def test_an_error_without_a_body_of_s3_is_known_by_its_status(body):
    assert explain(Head(503, {}), body).kind is ThrottledError


def test_a_success_may_hold_an_error():
    assert is_error(Head(200, {"content-type": "application/xml", "content-length": "200"}))
    assert not is_error(Head(200, {"content-type": "application/xml", "content-length": "20000000"}))
    assert not is_error(Head(200, {"content-type": "application/octet-stream", "content-length": "20"}))
    assert not is_error(Head(206, {"content-type": "application/xml", "content-length": "20"}))
    assert is_error(Head(307, {}))
