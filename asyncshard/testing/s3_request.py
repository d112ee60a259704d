"""The requests to an `S3Server`, and the faults that a test scripts for them. This module does no I/O."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

SizeOf = Callable[[str, str], int | None]
"""Function of a bucket and a key that returns the size of that object; None if there is no such object."""


@dataclass(frozen=True, slots=True)
class S3Request:
    """A request that has arrived at the server."""

    method: str
    """The HTTP method, such as ``GET``."""
    path: str
    """The path of the URL, percent-decoded, without the query."""
    query: Mapping[str, str]
    """The decoded query. A name without a value, such as ``location``, has an empty value."""
    headers: Mapping[str, str]
    """The headers by their names in lower case."""
    bucket: str
    """Name of the bucket, from the path or from the host."""
    key: str
    """Key of the object; empty if the request is about the bucket."""
    byte_range: tuple[int, int | None] | None
    """The `Range` as a half-open (start, stop). Stop is None for an open end; for a suffix it is the size of the
    object. None without a `Range`, and for a `Range` that servers ignore: several ranges, another unit, or a malformed
    one."""
    connection: int
    """Number of the TCP connection. Connections are numbered from 0 in the order in which they were made."""
    http_version: str = "1.1"

    @property
    def is_signed(self) -> bool:
        """Whether the request has a signature, in a header or in the query. The server does not check it."""
        return "authorization" in self.headers or "X-Amz-Signature" in self.query

    @property
    def is_last(self) -> bool:
        """Whether the client wants the connection closed after the answer."""
        return self.http_version == "1.0" or self.headers.get("connection", "").lower() == "close"


@dataclass(slots=True, kw_only=True, eq=False)
class S3Fault:
    """An error that a server makes with some requests: another answer, or a change to the right answer.

    For each request a server goes through its faults in their order, and uses the first one that takes the request; the
    later ones do not count this request. The fields `refuse`, `hang`, `raw` and `status` replace the answer. If several
    of these four are set, the first one in this order is used. All other fields may be combined.
    """

    times: int | None = 1
    """The number of requests that the fault still takes, which is counted down; None for no limit."""
    when: Callable[[S3Request], bool] | None = None
    """Predicate of the requests that the fault takes; None takes any request."""
    skip: int = 0
    """The number of such requests that the fault lets pass before it takes one, which is counted down."""
    before: Callable[[], object] | None = None
    """Called before the answer is made, for example to replace the object. If it returns an awaitable, the answer
    waits for it: ``event.wait`` holds the request until the test sets the event."""
    delay_s: float = 0.0
    """The answer begins this many seconds later."""

    refuse: bool = False
    """Reset the connection instead of answering."""
    hang: bool = False
    """Never answer, and keep the connection open."""
    raw: bytes | None = None
    """Send these bytes as the whole answer, then close the connection."""
    status: int | None = None
    """Answer with an error of this HTTP status instead."""
    code: str = ""
    """The S3 error code for `status`; empty for the code that S3 uses most with this status."""
    message: str = "Injected by the test."
    """The message of the error for `status`."""

    ignores_range: bool = False
    """Answer 200 with the whole object, whatever the `Range`."""
    ignores_if_match: bool = False
    """Answer as if the request had no `If-Match`."""
    body: bytes | None = None
    """Send this body, which may have any length, with a `Content-Length` that fits it."""
    content_length: int | None = None
    """Send this `Content-Length`. If it is too large, the client waits for more, unless the fault also `closes`."""
    chunked: bool = False
    """Send the body with `Transfer-Encoding: chunked`, one chunk for each piece written."""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Headers to set, or to remove if the value is None, after all other changes. The end of the connection ends an
    answer that has no length."""

    trickle: tuple[int, float] | None = None
    """Bytes and seconds: send the body in pieces of this many bytes, and pause this many seconds after each piece."""
    cut_after: int | None = None
    """Close the connection after this many bytes of the body."""
    resets: bool = False
    """Reset the connection that `cut_after` closes. Bytes that the client has not received may be lost."""
    stall_after: int | None = None
    """Stop sending after this many bytes of the body, and keep the connection open."""
    surplus: bytes = b""
    """Send these bytes after the complete body."""
    closes: bool = False
    """Close the connection after the answer, without a header that says so."""

    def takes(self, request: S3Request) -> bool:
        """Return whether the fault applies to a request. A request that it takes, or skips, is counted."""
        if self.times == 0 or (self.when is not None and not self.when(request)):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            self.times -= 1
        return True


def parse_request(head: bytes, *, connection: int, buckets: Collection[str], size_of: SizeOf) -> S3Request:
    """Parse the head of an HTTP/1 request, up to and with the empty line.

    Raises
    ------
    ValueError
        `head` is not the head of a request.
    """
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    line = re.fullmatch(r"([A-Z]+) (/\S*) HTTP/(1\.[01])", first)
    if line is None:
        raise ValueError("the first line is not that of an HTTP/1 request to a path")
    method, target, version = line.groups()
    headers = {}
    for text in lines:
        name, colon, value = text.partition(":")
        if not colon or not name or name != name.strip():
            raise ValueError("a line of the head is no header")
        headers[name.lower()] = value.strip()
    if not headers.get("content-length", "0").isdecimal() or "transfer-encoding" in headers:
        raise ValueError("the body needs a Content-Length")
    encoded, _, query = target.partition("?")
    path = unquote(encoded)
    bucket = _bucket_of_host(headers.get("host", ""), buckets)
    key = path[1:]
    if bucket is None:
        bucket, _, key = key.partition("/")
    return S3Request(
        method=method,
        path=path,
        query=dict(parse_qsl(query, keep_blank_values=True)),
        headers=headers,
        bucket=bucket,
        key=key,
        byte_range=range_of(headers.get("range", ""), size_of(bucket, key)),
        connection=connection,
        http_version=version,
    )


def range_of(text: str, size: int | None) -> tuple[int, int | None] | None:
    """Return the half-open range of a `Range` header; None for a header that servers ignore (RFC 9110, 14.2)."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", text)
    if found is None:
        return None
    first, last = found.groups()
    if first:
        start, stop = int(first), int(last) + 1 if last else None
        return None if stop is not None and stop <= start else (start, stop)
    if not last or size is None:
        return None
    return max(size - int(last), 0), size


def _bucket_of_host(host: str, buckets: Collection[str]) -> str | None:
    """Return the bucket that the `Host` of a request in virtual-hosted style names; None for path style."""
    name = re.sub(r":\d+$", "", host)
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.endswith(".localhost"):
            return name.removesuffix(".localhost")
        return max((bucket for bucket in buckets if name.startswith(f"{bucket}.")), key=len, default=None)
    return None
