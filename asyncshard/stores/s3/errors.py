"""The errors of S3: responses of a server, turned into `Failure`s.

Codes and status are those of the API reference, "Error responses".
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
from asyncshard.stores.http.failures import Action, Failure
from asyncshard.stores.http.response import MAX_ERROR_BYTES, NO_RANGES, ResponseHead, replaced, unusable


class ErrorBody(NamedTuple):
    """Contents of the XML of an S3 error."""

    code: str = ""
    """One of the API's error codes, as in ``NoSuchKey``."""
    message: str = ""
    """The server's own words."""
    region: str | None = None
    """Where the bucket is, if the request went to another region."""
    server_time: str | None = None
    """The server's time in ISO 8601, if the request was signed with another one."""


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
    """Meaning of an error: the remedy, and the user's error."""

    action: Action
    kind: type[StoreError]
    advice: str
    """The cause in words, and what to check."""


_MAX_TEXT = 300
"""300 characters of the server's own words are told at most."""
_MAX_SKEW_S = 15 * 60
"""S3 takes no signature from a clock that differs by more than 15 minutes (API reference, RequestTimeTooSkewed)."""
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


def is_error(head: ResponseHead) -> bool:
    """Return whether the body is, or may be, an error: S3 may say 200 before it knows that it fails."""
    if head.status == 200:
        length = head.headers.get("content-length", "0")
        return "xml" in head.headers.get("content-type", "") and length.isdigit() and int(length) <= MAX_ERROR_BYTES
    return head.status // 100 != 2


def failure_of_response(head: ResponseHead, body: bytes) -> Failure:
    """Return the failure that a response with an error means."""
    return failure_of_error(head, parse_error(body))


def failure_of_error(head: ResponseHead, error: ErrorBody) -> Failure:
    """Return the failure that a response means, whose error has been parsed."""
    meaning = _BY_CODE.get(error.code) or _BY_STATUS.get(head.status)
    if error.code == "AccessDenied" and "expired" in error.message.lower():
        meaning = _EXPIRED  # the presigned URL has expired
    if head.status == 200 and meaning is None:
        return unusable(head, NO_RANGES)
    server_time = _server_time(head.headers, error)
    if head.status == 403 and server_time is not None and abs(server_time - time()) > _MAX_SKEW_S:
        meaning = _SKEWED  # to a presigned URL, or a HEAD, S3 does not answer with the code of it
    if meaning is None:
        meaning = _Meaning(Action.GIVE_UP, StoreError, "the server refuses the request")
    action = meaning.action
    region = head.headers.get("x-amz-bucket-region") or error.region
    if action is Action.CHANGE_REGION and not region:
        action = Action.GIVE_UP
    if meaning.kind is ObjectChangedError:
        return replaced(head, "the server holds another one (412)")
    if meaning.kind is TruncatedError:
        meaning = meaning._replace(advice="the object has no such bytes; it was truncated or replaced")
    what = " ".join(filter(None, (f"HTTP {head.status}", error.code)))
    said = f" ({error.message[:_MAX_TEXT]})" if error.message and meaning.kind is StoreError else ""
    return Failure(
        f"{meaning.advice} [{what}{said}]",
        action=action,
        kind=meaning.kind,
        status=head.status,
        request_id=head.request_id,
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
