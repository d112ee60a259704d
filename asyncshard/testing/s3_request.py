"""What an `S3Server` is asked, and what is to go wrong with it. Pure: bytes and values in, values out."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

SizeOf = Callable[[str, str], int | None]
"""The size of the object of a bucket and a key, None where there is none."""


@dataclass(frozen=True, slots=True)
class S3Request:
    """A request that has arrived."""

    method: str
    path: str
    """As sent, percent-decoded, without the query."""
    query: Mapping[str, str]
    """Decoded. A name without a value, like ``location``, has the empty one."""
    headers: Mapping[str, str]
    """By name in lower case."""
    bucket: str
    key: str
    """Empty where the request is about the bucket."""
    byte_range: tuple[int, int | None] | None
    """The `Range` as a half-open (start, stop). Stop is None for an open end; of a suffix it is the object's size.
    None without a `Range`, and for one to be ignored: of several ranges, of another unit, or malformed."""
    connection: int
    """Number of the TCP connection, from 0 in the order in which they were made."""
    http_version: str = "1.1"

    @property
    def is_signed(self) -> bool:
        """Whether it carries a signature, in a header or in the query. Nobody checks it."""
        return "authorization" in self.headers or "X-Amz-Signature" in self.query

    @property
    def is_last(self) -> bool:
        """Whether the client wants the connection closed after the answer."""
        return self.http_version == "1.0" or self.headers.get("connection", "").lower() == "close"


@dataclass(slots=True, kw_only=True, eq=False)
class S3Fault:
    """What goes wrong with the requests that it takes, in place of the right answer or on top of it.

    A server asks its faults in their order, and the first that takes a request is used; those behind it do not count
    that request. Of `refuse`, `hang`, `raw` and `status`, which stand in place of the answer, the first one of these
    is used. All others may be combined.
    """

    times: int | None = 1
    """How many requests it still takes, counted down; None for all."""
    when: Callable[[S3Request], bool] | None = None
    """Which requests it takes; None for any."""
    skip: int = 0
    """How many of these it still lets pass first, counted down."""
    before: Callable[[], object] | None = None
    """Called before the answer is made, say to replace the object. If it returns an awaitable, the answer waits for
    that: ``event.wait`` holds the request until the test lets it go."""
    delay_s: float = 0.0
    """How much later the answer begins."""

    refuse: bool = False
    """Reset the connection instead of answering."""
    hang: bool = False
    """Never answer, keep the connection open."""
    raw: bytes | None = None
    """These bytes as the whole answer; then the connection is closed."""
    status: int | None = None
    """Answer with an error of this status instead."""
    code: str = ""
    """Its code, by default a usual one of the status."""
    message: str = "Injected by the test."

    ignores_range: bool = False
    """Answer 200 with the whole object."""
    ignores_if_match: bool = False
    body: bytes | None = None
    """Another body, of any length, with a `Content-Length` that fits."""
    content_length: int | None = None
    """Another `Content-Length`. Where it is too large the client waits for more, unless the fault also `closes`."""
    chunked: bool = False
    """Send the body with `Transfer-Encoding: chunked`, one chunk for each piece written."""
    headers: Mapping[str, str | None] = field(default_factory=dict)
    """Headers to set, or with None to remove, last of all. An answer left without a length ends with the connection."""

    trickle: tuple[int, float] | None = None
    """Send the body in pieces of so many bytes, with a pause of so many seconds after each."""
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    resets: bool = False
    """Where the connection is cut, reset it. What is still under way to the client may be lost."""
    stall_after: int | None = None
    """Send no more after so many bytes of the body, keep the connection open."""
    surplus: bytes = b""
    """Bytes sent after the complete body."""
    closes: bool = False
    """Close the connection after the answer, without a header that says so."""

    def takes(self, request: S3Request) -> bool:
        """Return whether it applies to a request, and count it."""
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
        It is none.
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
    """Return the half-open range of a `Range` header, None for one to be ignored (RFC 9110, 14.2)."""
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
    """Return the bucket that a virtual-hosted-style request names in its `Host`, None in path style."""
    name = re.sub(r":\d+$", "", host)
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.endswith(".localhost"):
            return name.removesuffix(".localhost")
        return max((bucket for bucket in buckets if name.startswith(f"{bucket}.")), key=len, default=None)
    return None
