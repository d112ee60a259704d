"""HTTP connections that stay open between exchanges."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from typing import NamedTuple

from asyncshard.errors import StoreTimeoutError
from asyncshard.stores.http.connection import HttpConnection
from asyncshard.stores.http.exchange import Headers, Limits, Receive
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.response import Response

_STAGING_BYTES = 256 << 10


class Origin(NamedTuple):
    """The server that a connection leads to."""

    scheme: str
    host: str
    port: int


class HttpPool:
    """Connections that stay open, each for one exchange at a time. Its user bounds how many there are at once.

    Parameters
    ----------
    limits : Limits
    make_tls : callable
        Returns the TLS context for https; called once, when it is first needed.
    idle_s : float
        Seconds after which an idle connection is not used again: servers and proxies drop such connections.
    """

    def __init__(self, limits: Limits, make_tls: Callable[[], ssl.SSLContext], *, idle_s: float = 15.0) -> None:
        self._limits = limits
        self._make_tls = make_tls
        self._tls: ssl.SSLContext | None = None
        self._idle_s = idle_s
        self._idle: dict[Origin, list[tuple[HttpConnection, float]]] = {}
        self._open: set[HttpConnection] = set()
        self._staging = memoryview(bytearray(_STAGING_BYTES))

    async def exchange(self, origin: Origin, target: str, headers: Headers, receive: Receive) -> Response:
        """Send a GET on an idle or a new connection; see `HttpConnection.exchange`."""
        connection = self._take_idle(origin) or await self._connect(origin)
        response = await connection.exchange(target, headers, receive)
        if connection.is_usable():
            self._idle.setdefault(origin, []).append((connection, time.monotonic()))
        else:
            connection.abort()
        return response

    async def aclose(self) -> None:
        """Close all connections. The caller has awaited all exchanges."""
        closing = [connection.closed for connection in self._open]
        for connection in self._open.copy():
            connection.abort()
        self._idle.clear()
        if closing:
            await asyncio.wait(closing)

    def _take_idle(self, origin: Origin) -> HttpConnection | None:
        idle = self._idle.get(origin, [])
        while idle:
            connection, since = idle.pop()
            if time.monotonic() - since <= self._idle_s and connection.is_usable():
                return connection
            connection.abort()
        return None

    async def _connect(self, origin: Origin) -> HttpConnection:
        loop = asyncio.get_running_loop()
        is_tls = origin.scheme == "https"
        if is_tls and self._tls is None:
            self._tls = self._make_tls()
        connection = HttpConnection(self._limits, self._open, self._staging)
        is_connected = False
        try:
            async with asyncio.timeout(self._limits.connect_timeout_s):
                await loop.create_connection(
                    lambda: connection,
                    origin.host,
                    origin.port,
                    ssl=self._tls if is_tls else None,
                    server_hostname=origin.host if is_tls else None,
                )
                is_connected = True
        except TimeoutError:
            reason = f"no connection within {self._limits.connect_timeout_s:g} s (connect_timeout_s)"
            raise Failed(Failure(reason, action=Action.RETRY, kind=StoreTimeoutError)) from None
        except ssl.SSLCertVerificationError as error:
            raise Failed(
                Failure(
                    f"the server's certificate is not trusted ({error.verify_message}): pass verify=, the path of its "
                    "certificate authority"
                )
            ) from None
        except (OSError, ssl.SSLError) as error:
            raise Failed(Failure(_no_connection(origin, error), action=Action.RETRY)) from None
        else:
            return connection
        finally:
            if not is_connected:
                # The loop closes what it had begun, but does not always tell a protocol whose connecting was cancelled.
                connection.abort()
                self._open.discard(connection)


def _no_connection(origin: Origin, error: OSError) -> str:
    reason = "TLS failed" if isinstance(error, ssl.SSLError) else "there is no connection"
    if isinstance(error, socket.gaierror):
        reason = "the host is not known"
    with contextlib.suppress(AttributeError, IndexError):
        reason = f"{reason} ({error.strerror or error.args[-1]})"
    return f"{reason}: check that {origin.host}:{origin.port} (endpoint_url) is right and up"
