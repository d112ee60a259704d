"""The answers of an `S3Server`, right and wrong: pure functions from stored objects and a request to an answer.

Sources: the S3 API reference for GetObject, HeadObject, ListObjectsV2, GetBucketLocation, HeadBucket and the error
responses, and RFC 9110 for ranges and conditions.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import formatdate
from http import HTTPStatus
from urllib.parse import quote_plus
from xml.sax.saxutils import escape

from asyncshard.testing.s3_request import S3Fault, S3Request, range_of

_XMLNS = "http://s3.amazonaws.com/doc/2006-03-01/"
_CODES = {
    301: "PermanentRedirect",
    307: "TemporaryRedirect",
    400: "BadRequest",
    401: "Unauthorized",
    403: "AccessDenied",
    404: "NoSuchKey",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    409: "OperationAborted",
    412: "PreconditionFailed",
    416: "InvalidRange",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}


@dataclass(frozen=True, slots=True)
class S3Object:
    """An object in a bucket."""

    data: memoryview
    etag: str
    """The ETag as it is sent, with its quotes."""
    headers: Mapping[str, str]
    """Further headers of answers to GET and HEAD."""
    modified_s: float
    """When the object was stored, in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class S3State:
    """The state of a server on which its answers depend."""

    buckets: Mapping[str, Mapping[str, S3Object]]
    """The objects of each bucket by their keys."""
    max_keys: int
    """A page of a listing has at most this many entries."""
    region: str
    """The region of all buckets."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer. A fault may still cut it, stall it or slow it down while it is sent."""

    status: int
    headers: Mapping[str, str]
    body: memoryview
    is_last: bool = False
    """Whether the connection is closed after the answer."""

    def head(self) -> bytes:
        """Return the first line and the headers, up to and with the empty line."""
        try:
            phrase = HTTPStatus(self.status).phrase
        except ValueError:
            phrase = ""
        lines = [f"HTTP/1.1 {self.status} {phrase}", *(f"{name}: {value}" for name, value in self.headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _Refusal(Exception):
    """An error that becomes an answer, as S3 sends it."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code or _CODES.get(status, "UnknownError")
        self.headers = headers or {}


def answer_to(request: S3Request, fault: S3Fault, state: S3State, *, number: int, now_s: float) -> Answer:
    """Return the answer to request `number` of a server, changed as the fault says.

    Delays, cuts and other effects in time are not part of the answer: `S3Connection` makes them.
    """
    request_id = f"{number:016X}"
    host_id = base64.b64encode(request_id.encode()).decode()
    try:
        if fault.status is not None:
            raise _Refusal(fault.status, fault.code, fault.message)
        answer = _right_answer(request, fault, state)
    except _Refusal as refusal:
        answer = _error(request, refusal, request_id, host_id)
    always = {
        "Server": "AmazonS3",
        "Date": formatdate(now_s, usegmt=True),
        "x-amz-request-id": request_id,
        "x-amz-id-2": host_id,
    }
    if request.is_last:
        always["Connection"] = "close"
    return _spoiled(replace(answer, headers=always | dict(answer.headers)), request, fault)


def bad_request(message: str) -> bytes:
    """Return the bytes of an answer to something that is not an HTTP request."""
    body = f"<Error><Code>BadRequest</Code><Message>{escape(message)}</Message></Error>".encode()
    headers = {"Content-Type": "application/xml", "Content-Length": str(len(body)), "Connection": "close"}
    return Answer(400, headers, memoryview(body)).head() + body


def _spoiled(answer: Answer, request: S3Request, fault: S3Fault) -> Answer:
    """Return the answer with the fault's changes, and with the headers that tell where its body ends."""
    body = answer.body if fault.body is None else memoryview(fault.body)
    has_no_body = answer.status in (204, 304)
    headers = dict(answer.headers)
    if fault.chunked:
        headers["Transfer-Encoding"] = "chunked"
    elif not has_no_body:
        headers["Content-Length"] = str(len(body) if fault.content_length is None else fault.content_length)
    changed = {name.lower() for name in fault.headers}
    headers = {name: value for name, value in headers.items() if name.lower() not in changed}
    headers |= {name: value for name, value in fault.headers.items() if value is not None}
    names = {name.lower(): value for name, value in headers.items()}
    if request.method == "HEAD" or has_no_body:
        body = memoryview(b"")
        has_end = True
    else:
        has_end = "content-length" in names or "transfer-encoding" in names
    is_last = fault.closes or not has_end or request.is_last or names.get("connection", "").lower() == "close"
    return Answer(answer.status, headers, body, is_last)


def _right_answer(request: S3Request, fault: S3Fault, state: S3State) -> Answer:
    if not request.bucket:
        raise _Refusal(501, "NotImplemented", "A header or query you provided implies functionality not implemented")
    objects = state.buckets.get(request.bucket)
    if objects is None:
        raise _Refusal(404, "NoSuchBucket", "The specified bucket does not exist")
    if request.method not in ("GET", "HEAD"):
        raise _Refusal(405, "MethodNotAllowed", "The specified method is not allowed against this resource")
    if request.key:
        return _object(request, fault, objects)
    if request.method == "HEAD":
        return Answer(200, {"x-amz-bucket-region": state.region, "Content-Type": "application/xml"}, memoryview(b""))
    if "location" in request.query:
        region = "" if state.region == "us-east-1" else state.region
        return _xml(200, f'<LocationConstraint xmlns="{_XMLNS}">{region}</LocationConstraint>')
    if request.query.get("list-type") == "2":
        return _listing(request, state, objects)
    raise _Refusal(501, "NotImplemented", "A header or query you provided implies functionality not implemented")


def _object(request: S3Request, fault: S3Fault, objects: Mapping[str, S3Object]) -> Answer:
    stored = objects.get(request.key)
    if stored is None:
        raise _Refusal(404, "NoSuchKey", "The specified key does not exist.")
    wanted = request.headers.get("if-match", "*")
    if not fault.ignores_if_match and wanted != "*" and stored.etag not in [tag.strip() for tag in wanted.split(",")]:
        raise _Refusal(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
    size = len(stored.data)
    headers = {
        "Content-Type": "binary/octet-stream",
        "ETag": stored.etag,
        "Last-Modified": formatdate(stored.modified_s, usegmt=True),
        "Accept-Ranges": "bytes",
    }
    # The range is resolved against the size that the object has now: a fault may have replaced it in the meantime.
    asked = None if fault.ignores_range else range_of(request.headers.get("range", ""), size)
    # S3 leaves the checksums of the object out of answers to ranges.
    has_checksums = request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED" and asked is None
    headers |= {
        name: value
        for name, value in stored.headers.items()
        if has_checksums or not name.lower().startswith("x-amz-checksum-")
    }
    if asked is None:
        return Answer(200, headers, stored.data)
    start, stop = asked[0], size if asked[1] is None else min(asked[1], size)
    if start >= size:
        content_range = {"Content-Range": f"bytes */{size}"}
        raise _Refusal(416, "InvalidRange", "The requested range is not satisfiable", content_range)
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(206, headers, stored.data[start:stop])


def _listing(request: S3Request, state: S3State, objects: Mapping[str, S3Object]) -> Answer:
    """Answer ListObjectsV2. The continuation token contains the last key of the page, listed or grouped in a prefix."""
    query = request.query
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    token = query.get("continuation-token", "")
    try:
        after = base64.urlsafe_b64decode(token).decode() if token else query.get("start-after", "")
        max_keys = int(query.get("max-keys", state.max_keys))
    except (ValueError, binascii.Error):
        raise _Refusal(400, "InvalidArgument", "The continuation token or max-keys provided is incorrect") from None
    limit = min(max_keys, state.max_keys)
    keys = sorted((key for key in objects if key.startswith(prefix) and key > after), key=str.encode)
    contents: list[str] = []
    prefixes: list[str] = []
    is_truncated = False
    for key in keys:
        rest = key[len(prefix) :]
        group = prefix + rest[: rest.index(delimiter)] + delimiter if delimiter and delimiter in rest else None
        if group is None or group not in prefixes:
            if len(contents) + len(prefixes) >= limit:
                is_truncated = limit > 0
                break
            if group is None:
                contents.append(key)
            else:
                prefixes.append(group)
        after = key

    is_encoded = query.get("encoding-type") == "url"

    def text(value: str) -> str:
        return quote_plus(value, safe="/") if is_encoded else escape(value, {"\r": "&#13;", "\n": "&#10;"})

    fields = {
        "Name": escape(request.bucket),
        "Prefix": text(prefix),
        "MaxKeys": str(limit),
        "KeyCount": str(len(contents) + len(prefixes)),
        "IsTruncated": str(is_truncated).lower(),
    }
    if delimiter:
        fields["Delimiter"] = text(delimiter)
    if is_encoded:
        fields["EncodingType"] = "url"
    if token:
        fields["ContinuationToken"] = escape(token)
    if "start-after" in query:
        fields["StartAfter"] = text(query["start-after"])
    if is_truncated:
        fields["NextContinuationToken"] = base64.urlsafe_b64encode(after.encode()).decode()
    elements = [f"<{name}>{value}</{name}>" for name, value in fields.items()]
    elements += [_contents(text(key), objects[key]) for key in contents]
    elements += [f"<CommonPrefixes><Prefix>{text(group)}</Prefix></CommonPrefixes>" for group in prefixes]
    return _xml(200, f'<ListBucketResult xmlns="{_XMLNS}">{"".join(elements)}</ListBucketResult>')


def _contents(key: str, stored: S3Object) -> str:
    modified = datetime.fromtimestamp(stored.modified_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return (
        f"<Contents><Key>{key}</Key><LastModified>{modified}</LastModified><ETag>{escape(stored.etag)}</ETag>"
        f"<Size>{len(stored.data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _error(request: S3Request, refusal: _Refusal, request_id: str, host_id: str) -> Answer:
    fields = {"Code": refusal.code, "Message": str(refusal), "BucketName": request.bucket, "Key": request.key}
    fields |= {"RequestId": request_id, "HostId": host_id}
    elements = "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items() if value)
    answer = _xml(refusal.status, f"<Error>{elements}</Error>")
    return replace(answer, headers=dict(answer.headers) | dict(refusal.headers))


def _xml(status: int, root: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{root}'.encode()
    return Answer(status, {"Content-Type": "application/xml"}, memoryview(body))
