"""What the errors of S3 mean, and what helps against each."""

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
from asyncshard.stores.http.failures import Action
from asyncshard.stores.http.response import ResponseHead
from asyncshard.stores.s3.errors import failure_of_response, is_error


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
    failure = failure_of_response(ResponseHead(status, {"x-amz-request-id": "ID"}), xml(code) if code else b"")
    assert (failure.action, failure.kind, failure.status, failure.request_id) == (action, kind, status, "ID")


def test_the_region_of_a_bucket_is_found_in_the_header_or_in_the_body():
    for response in (
        (ResponseHead(301, {"x-amz-bucket-region": "eu-west-1"}), b""),
        (ResponseHead(400, {}), xml("AuthorizationHeaderMalformed", Region="eu-west-1")),
    ):
        failure = failure_of_response(*response)
        assert (failure.action, failure.region) == (Action.CHANGE_REGION, "eu-west-1")


def test_the_time_of_the_server_is_found_in_the_body_or_in_the_header():
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    date = {"date": "Fri, 02 Jan 2026 03:04:05 GMT"}
    for headers, body in (
        (date, xml("RequestTimeTooSkewed")),
        ({}, xml("RequestTimeTooSkewed", ServerTime="2026-01-02T03:04:05Z")),
        (date, xml("RequestTimeTooSkewed", ServerTime="no time")),
    ):
        assert failure_of_response(ResponseHead(403, headers), body).server_time == moment


@pytest.mark.parametrize("code", ["", "AccessDenied"])
def test_clocks_that_are_far_apart_explain_a_refusal_without_a_code_of_its_own(code):
    body = xml(code, Message="Request has expired") if code else b""
    failure = failure_of_response(ResponseHead(403, {"date": "Fri, 02 Jan 2006 03:04:05 GMT"}), body)
    assert failure.action is Action.CORRECT_CLOCK


def test_a_presigned_url_that_expired_is_signed_anew():
    failure = failure_of_response(ResponseHead(403, {}), xml("AccessDenied", Message="Request has expired"))
    assert failure.action is Action.REFRESH_CREDENTIALS


@pytest.mark.parametrize(("text", "seconds"), [("7", 7), ("", 0), ("-1", 0), ("Fri, 02 Jan 2026 03:04:05 GMT", 0)])
def test_the_server_may_ask_for_a_pause(text, seconds):
    assert failure_of_response(ResponseHead(503, {"retry-after": text}), b"").retry_after_s == seconds


@pytest.mark.parametrize("body", [b"", b"\0", b"<Error>", b"<html><body>502</body></html>", b"\xff\xfe", b"<a/>" * 2])
def test_an_error_without_a_body_of_s3_is_known_by_its_status(body):
    assert failure_of_response(ResponseHead(503, {}), body).kind is ThrottledError


def test_a_success_may_hold_an_error():
    assert is_error(ResponseHead(200, {"content-type": "application/xml", "content-length": "200"}))
    assert not is_error(ResponseHead(200, {"content-type": "application/xml", "content-length": "20000000"}))
    assert not is_error(ResponseHead(200, {"content-type": "application/octet-stream", "content-length": "20"}))
    assert not is_error(ResponseHead(206, {"content-type": "application/xml", "content-length": "20"}))
    assert is_error(ResponseHead(307, {}))
