"""Two ways to get objects: over sockets of our own, or through aiobotocore."""

from __future__ import annotations

import asyncio
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qsl, urlencode, urljoin, urlsplit

from asyncshard.errors import StoreTimeoutError, TruncatedError
from asyncshard.stores.http.exchange import Limits, Receive
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.pool import HttpPool, Origin
from asyncshard.stores.http.response import MAX_ERROR_BYTES, Response, ResponseHead
from asyncshard.stores.s3.client import S3Client

_MAX_REDIRECTS = 3
_PRINTABLE = re.compile("[!-~]+")
"""The characters that a URL may have (RFC 3986)."""
_PIECE = 256 << 10


class Transport(ABC):
    """Gets the objects of one bucket."""

    @abstractmethod
    async def get(self, key: str, headers: Mapping[str, str], receive: Receive) -> Response:
        """Send one request; `receive` decides from the head of the response where its body goes.

        Raises
        ------
        Failed
            There is no whole response, or `receive` raised. Nothing is written into the scatter any more.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close its connections."""


class SocketTransport(Transport):
    """Receives bodies straight from the socket into their memory. Requests are signed by botocore."""

    def __init__(self, client: S3Client, pool: HttpPool) -> None:
        self._client = client
        self._pool = pool

    async def get(self, key: str, headers: Mapping[str, str], receive: Receive) -> Response:
        signed = await self._client.urls.get(key)
        url = signed.url
        for _ in range(_MAX_REDIRECTS + 1):
            origin = origin_of(url)
            sent = {"Host": host_of(origin), **headers, **signed.headers, "Accept-Encoding": "identity"}
            response = await self._pool.exchange(origin, target_of(url), list(sent.items()), receive)
            region = response.head.headers.get("x-amz-bucket-region", self._client.region)
            if response.head.status != 307 or region != self._client.region:
                return response  # in another region the signature has to be another one
            url = redirected(signed.url, url, response.head)
        raise Failed(Failure(f"the server redirects more than {_MAX_REDIRECTS} times", status=307))

    async def aclose(self) -> None:
        await self._pool.aclose()


def origin_of(url: SplitResult) -> Origin:
    """Return the server of a URL."""
    assert url.hostname is not None
    return Origin(url.scheme, url.hostname, url.port or (443 if url.scheme == "https" else 80))


def host_of(origin: Origin) -> str:
    """Return the ``Host`` header as botocore signs it: in lower case, with a port only if it is not the usual one."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    is_usual = origin.port == (443 if origin.scheme == "https" else 80)
    return host if is_usual else f"{host}:{origin.port}"


def target_of(url: SplitResult) -> str:
    """Return the target of the request line for a URL: its path and query."""
    return (url.path or "/") + (f"?{url.query}" if url.query else "")


def redirected(signed: SplitResult, current: SplitResult, head: ResponseHead) -> SplitResult:
    """Return the URL that a redirect leads to, without our signature if it is on another server.

    Raises
    ------
    Failed
        The redirect leads nowhere, or out of TLS.
    """
    location = head.headers.get("location", "")
    try:
        url = urlsplit(urljoin(current.geturl(), location))
        is_url = bool(location) and url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # the port or the address is none
        is_url = False
    if not is_url or not _PRINTABLE.fullmatch(location):
        raise Failed(Failure("the server redirects without saying where", status=head.status))
    if current.scheme == "https" and url.scheme != "https":
        raise Failed(Failure("the server redirects from https to http", status=head.status))
    if url.username is not None:
        url = url._replace(netloc=url.netloc.rpartition("@")[2])
    if origin_of(url) != origin_of(signed):
        signature = set(parse_qsl(signed.query, keep_blank_values=True))
        parameters = [
            pair
            for pair in parse_qsl(url.query, keep_blank_values=True)
            if pair not in signature or not pair[0].lower().startswith("x-amz-")
        ]
        url = url._replace(query=urlencode(parameters))
    return url


class BotoTransport(Transport):
    """Receives bodies through aiobotocore: slower, but it can do more (proxies, client certificates, S3 Express)."""

    def __init__(self, client: S3Client, limits: Limits) -> None:
        self._client = client
        self._limits = limits

    async def get(self, key: str, headers: Mapping[str, str], receive: Receive) -> Response:
        clock = asyncio.get_running_loop().time
        async with self._client.get(key, headers) as (head, body):
            scatter = receive(head)
            if scatter is None:  # an error inside a success: botocore raises all others
                return Response(head, await body.read(MAX_ERROR_BYTES))
            began, window = clock(), 0
            while piece := await body.read(_PIECE):
                if len(piece) > scatter.nbytes - scatter.filled:
                    raise Failed(Failure("the body is longer than what was asked for", status=head.status))
                scatter.write(memoryview(piece))
                window += len(piece)
                if clock() - began >= self._limits.slow_window_s:
                    if window < self._limits.slow_bytes:
                        reason = f"only {window:,} bytes came in {self._limits.slow_window_s:g} s"
                        raise Failed(Failure(reason, action=Action.RETRY, kind=StoreTimeoutError))
                    began, window = clock(), 0
            if scatter.filled < scatter.nbytes:
                raise Failed(Failure("the body ended early", action=Action.RETRY, kind=TruncatedError))
            return Response(head, b"")

    async def aclose(self) -> None:
        pass  # the client closes its own
