"""Whether the response to a request for a byte range is data: decided from its head, before its body is placed.

RFC 9110: a range is answered by 206 with ``Content-Range`` (14.4, 15.3.7). Never data: another ETag than the pinned
one, a ``Content-Range`` that is missing or not exactly what was asked, a length that does not agree with it, a
``Content-Encoding``, a 200 in place of a 206.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from asyncshard.errors import ObjectChangedError
from asyncshard.stores.http.failures import Failed, Failure

MAX_ERROR_BYTES = 64 << 10
"""64 KiB of an error's body are read at most."""
NO_RANGES = (
    "the server answered with something else where a byte range was asked for (no 206): it does not serve ranges, "
    "without which nothing can be read from it"
)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class ResponseHead(NamedTuple):
    """Status line and headers of a response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""

    @property
    def request_id(self) -> str | None:
        """Name of the request in the server's logs; None where the server does not say."""
        return self.headers.get("x-amz-request-id")


class Response(NamedTuple):
    """Head of a response, and its body if that is an error."""

    head: ResponseHead
    error_body: bytes
    """Empty where the body went to a scatter."""


class Pin(NamedTuple):
    """Version of an object, as its first response says. Every later response must say the same."""

    etag: str
    """The strong ETag, in its quotes."""
    size: int
    """Bytes of the object."""


class RangeRequest(NamedTuple):
    """The half-open byte range that was asked for."""

    start: int
    """First byte."""
    stop: int
    """The byte behind the last one."""
    pin: Pin | None
    """None for the first request: then the response may be shorter, where the object is."""


def require_range(head: ResponseHead, request: RangeRequest) -> tuple[Pin, int]:
    """Return the pin and the length of the body, if the body is the bytes that were asked for.

    Raises
    ------
    Failed
        It is not, though the status is that of success.
    """
    headers = head.headers
    etag = headers.get("etag", "")
    if head.status != 206:
        raise _failed(head, NO_RANGES)
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise _failed(
            head,
            f"the body is encoded ({headers['content-encoding']}), so its bytes are not the object's; store the object "
            "without a Content-Encoding",
        )
    if not etag or etag.startswith("W/"):
        raise _failed(head, "the server sends no strong ETag, so a replaced object could not be told from the first")
    if request.pin is not None and etag != request.pin.etag:
        raise Failed(replaced(head, f"its ETag was {request.pin.etag} and is now {etag}"))
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if match is None:
        raise _failed(head, f"Content-Range is {headers.get('content-range')!r}, which says not what came")
    first, last, size = map(int, match.groups())
    if request.pin is not None and size != request.pin.size:
        raise Failed(replaced(head, f"it had {request.pin.size:,} bytes and now has {size:,}"))
    stop = request.stop if request.pin is not None else min(request.stop, size)
    if (first, last + 1) != (request.start, stop):
        raise _failed(head, f"the answer is bytes {first}-{last} of {size}, not {request.start}-{stop - 1} as asked")
    length = stop - request.start
    if headers.get("content-length", str(length)) != str(length):
        raise _failed(head, f"the body has {headers['content-length']} bytes, not the {length} that were asked for")
    return Pin(etag, size), length


def _failed(head: ResponseHead, reason: str) -> Failed:
    return Failed(unusable(head, reason))


def unusable(head: ResponseHead, reason: str) -> Failure:
    """Return the failure of a response that is of no use, whatever it was to say."""
    return Failure(reason, status=head.status, request_id=head.request_id)


def replaced(head: ResponseHead, how: str) -> Failure:
    """Return the failure of a response about another object than the pinned one."""
    return Failure(
        f"the object was replaced while it was being loaded: {how}; load it again",
        kind=ObjectChangedError,
        status=head.status,
        request_id=head.request_id,
    )
