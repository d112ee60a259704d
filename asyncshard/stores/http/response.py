"""What an HTTP answer to a request for a byte range means: decided from its head, before a byte of the body is placed.

RFC 9110: a range is answered by 206 with ``Content-Range`` (14.4, 15.3.7). S3's error codes are those of its API
reference. Never data: another ETag than the pinned one, a ``Content-Range`` that is missing or not exactly what was
asked, a length that does not agree with it, a ``Content-Encoding``, a 200 in place of a 206.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import time
from typing import NamedTuple
from xml.etree import ElementTree

from asyncshard.errors import (
    AccessDeniedError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreTimeoutError,
    ThrottledError,
    TruncatedError,
)
from asyncshard.stores.http.failures import Action, Failed, Failure

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_MAX_TEXT = 300
_MAX_SKEW_S = 15 * 60
"""Further apart than this, S3 takes no signature (API reference, RequestTimeTooSkewed)."""
MAX_ERROR_BYTES = 64 << 10
"""What is read of the body of an error."""


class Head(NamedTuple):
    """Status line and headers of an answer."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""


class Pin(NamedTuple):
    """What every answer about an object must say, from the first one on."""

    etag: str
    size: int


class RangeRequest(NamedTuple):
    """The half-open byte range that was asked for."""

    start: int
    stop: int
    pin: Pin | None
    """None for the first request: then the answer may be shorter, where the object is."""


_NO_RANGES = (
    "the server answered with something else where a byte range was asked for (no 206): it does not serve ranges, "
    "without which nothing can be read from it"
)


def is_error(head: Head) -> bool:
    """Whether the body is, or may be, an error: S3 may say 200 before it knows that it fails."""
    if head.status == 200:
        length = head.headers.get("content-length", "0")
        return "xml" in head.headers.get("content-type", "") and length.isdigit() and int(length) <= MAX_ERROR_BYTES
    return head.status // 100 != 2


def require_range(head: Head, asked: RangeRequest) -> tuple[Pin, int]:
    """Return the pin and the length of the body, if the body is the bytes that were asked for.

    Raises
    ------
    Failed
        It is not, though the status is that of success.
    """
    headers = head.headers
    etag = headers.get("etag", "")
    if head.status != 206:
        raise _failed(head, _NO_RANGES)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _failed(
            head,
            f"the body is encoded ({headers['content-encoding']}), so its bytes are not the object's; store the object "
            "without a Content-Encoding",
        )
    if not etag or etag.startswith("W/"):
        raise _failed(head, "the server sends no strong ETag, so a replaced object could not be told from the first")
    if asked.pin is not None and etag != asked.pin.etag:
        raise Failed(_changed(head, f"its ETag was {asked.pin.etag} and is now {etag}"))
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if match is None:
        raise _failed(head, f"Content-Range is {headers.get('content-range')!r}, which says not what came")
    first, last, size = map(int, match.groups())
    if asked.pin is not None and size != asked.pin.size:
        raise Failed(_changed(head, f"it had {asked.pin.size:,} bytes and now has {size:,}"))
    stop = asked.stop if asked.pin is not None else min(asked.stop, size)
    if (first, last + 1) != (asked.start, stop):
        raise _failed(head, f"the answer is bytes {first}-{last} of {size}, not {asked.start}-{stop - 1} as asked")
    length = stop - asked.start
    if headers.get("content-length", str(length)) != str(length):
        raise _failed(head, f"the body has {headers['content-length']} bytes, not the {length} that were asked for")
    return Pin(etag, size), length


def _failed(head: Head, reason: str) -> Failed:
    return Failed(Failure(reason, status=head.status, request_id=request_id(head.headers)))


def _changed(head: Head, how: str) -> Failure:
    return Failure(
        f"the object was replaced while it was being loaded: {how}; load it again",
        kind=ObjectChangedError,
        status=head.status,
        request_id=request_id(head.headers),
    )


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return what the server calls the request in its logs."""
    return headers.get("x-amz-request-id")


class ErrorBody(NamedTuple):
    """What the XML of an S3 error says."""

    code: str = ""
    message: str = ""
    region: str | None = None
    server_time: str | None = None


def parse_error(body: bytes) -> ErrorBody:
    """Read the XML of an S3 error; all is empty where it is none."""
    try:
        root = ElementTree.fromstring(body)
    except (ElementTree.ParseError, ValueError, LookupError):
        return ErrorBody()
    fields = {element.tag.rpartition("}")[2]: (element.text or "").strip() for element in root.iter()}
    if root.tag.rpartition("}")[2] != "Error":
        return ErrorBody()
    return ErrorBody(fields.get("Code", ""), fields.get("Message", ""), fields.get("Region"), fields.get("ServerTime"))


class _Meaning(NamedTuple):
    action: Action
    kind: type[StoreError]
    advice: str


_RETRY = _Meaning(Action.RETRY, StoreError, "the server failed; try again later")
_THROTTLED = _Meaning(Action.RETRY, ThrottledError, "the server asks for fewer requests; lower max_workers")
_TIMEOUT = _Meaning(Action.RETRY, StoreTimeoutError, "the server gave up waiting")
_NO_KEY = _Meaning(Action.GIVE_UP, ObjectNotFoundError, "there is no such object: check the key")
_DENIED = _Meaning(
    Action.GIVE_UP,
    AccessDeniedError,
    "access is denied: check the credentials, and that they allow s3:GetObject and s3:ListBucket here",
)
_EXPIRED = _Meaning(Action.REFRESH_CREDENTIALS, AccessDeniedError, "the credentials have expired: get new ones")
_BAD_KEY = _Meaning(
    Action.GIVE_UP,
    AccessDeniedError,
    "the server does not know the access key: check aws_access_key_id and the profile",
)
_BAD_REGION = _Meaning(Action.CHANGE_REGION, StoreError, "the bucket is in another region: check region_name")
_SKEWED = _Meaning(Action.CORRECT_CLOCK, AccessDeniedError, "this machine's clock is wrong: set it")

_BY_CODE: Mapping[str, _Meaning] = {
    "SlowDown": _THROTTLED,
    "Throttling": _THROTTLED,
    "ThrottlingException": _THROTTLED,
    "RequestLimitExceeded": _THROTTLED,
    "BandwidthLimitExceeded": _THROTTLED,
    "ServiceUnavailable": _THROTTLED,
    "InternalError": _RETRY,
    "RequestTimeout": _TIMEOUT,
    "NoSuchBucket": _Meaning(
        Action.GIVE_UP, ObjectNotFoundError, "there is no such bucket: check its name, and endpoint_url"
    ),
    "NoSuchKey": _NO_KEY,
    "NoSuchVersion": _NO_KEY,
    "AccessDenied": _DENIED,
    "AllAccessDisabled": _DENIED,
    "InvalidAccessKeyId": _BAD_KEY,
    "SignatureDoesNotMatch": _Meaning(
        Action.GIVE_UP,
        AccessDeniedError,
        "the signature is wrong: check aws_secret_access_key, region_name and endpoint_url",
    ),
    "InvalidToken": _Meaning(Action.GIVE_UP, AccessDeniedError, "the session token is wrong: check aws_session_token"),
    "ExpiredToken": _EXPIRED,
    "ExpiredTokenException": _EXPIRED,
    "TokenRefreshRequired": _EXPIRED,
    "RequestExpired": _EXPIRED,
    "RequestTimeTooSkewed": _SKEWED,
    "AuthorizationHeaderMalformed": _BAD_REGION,
    "AuthorizationQueryParametersError": _BAD_REGION,
    "PermanentRedirect": _BAD_REGION,
    "InvalidObjectState": _Meaning(Action.GIVE_UP, AccessDeniedError, "the object is archived: restore it first"),
    "PreconditionFailed": _Meaning(Action.GIVE_UP, ObjectChangedError, ""),
    "InvalidRange": _Meaning(Action.GIVE_UP, TruncatedError, ""),
}

_BY_STATUS: Mapping[int, _Meaning] = {
    301: _BAD_REGION,
    401: _DENIED,
    403: _DENIED,
    404: _NO_KEY,
    408: _TIMEOUT,
    412: _BY_CODE["PreconditionFailed"],
    416: _BY_CODE["InvalidRange"],
    429: _THROTTLED,
    500: _RETRY,
    502: _RETRY,
    503: _THROTTLED,
    504: _TIMEOUT,
}


def explain(head: Head, body: bytes) -> Failure:
    """Say what an answer that is an error means, and what helps."""
    return explain_error(head, parse_error(body))


def explain_error(head: Head, error: ErrorBody) -> Failure:
    """The same, of an error whose XML has been read."""
    meaning = _BY_CODE.get(error.code) or _BY_STATUS.get(head.status)
    if error.code == "AccessDenied" and "expired" in error.message.lower():
        meaning = _EXPIRED  # of a presigned URL
    if head.status == 200 and meaning is None:
        return _failed(head, _NO_RANGES).failure
    server_time = _server_time(head.headers, error)
    if head.status == 403 and server_time is not None and abs(server_time - time()) > _MAX_SKEW_S:
        meaning = _SKEWED  # of a presigned URL, or a HEAD, S3 does not say it with a code
    if meaning is None:
        meaning = _Meaning(Action.GIVE_UP, StoreError, "the server refuses the request")
    action = meaning.action
    region = head.headers.get("x-amz-bucket-region") or error.region
    if action is Action.CHANGE_REGION and not region:
        action = Action.GIVE_UP
    if meaning.kind is ObjectChangedError:
        return _changed(head, "the server holds another one (412)")
    if meaning.kind is TruncatedError:
        meaning = meaning._replace(advice="the object has no such bytes; it was truncated or replaced")
    what = " ".join(filter(None, (f"HTTP {head.status}", error.code)))
    said = f" ({error.message[:_MAX_TEXT]})" if error.message and meaning.kind is StoreError else ""
    return Failure(
        f"{meaning.advice} [{what}{said}]",
        action=action,
        kind=meaning.kind,
        status=head.status,
        request_id=request_id(head.headers),
        retry_after_s=_retry_after(head.headers),
        region=region,
        server_time=server_time,
    )


def _retry_after(headers: Mapping[str, str]) -> float:
    text = headers.get("retry-after", "")
    return float(text) if re.fullmatch(r"\d{1,4}", text) else 0.0


def _server_time(headers: Mapping[str, str], error: ErrorBody) -> float | None:
    if error.server_time:
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(error.server_time).astimezone(UTC).timestamp()
    try:
        return parsedate_to_datetime(headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
