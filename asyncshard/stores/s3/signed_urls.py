"""URLs that get the objects of one bucket, signed once for many requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

URL_LIFETIME_S = 900
"""A server takes a signed URL for 15 minutes."""
_SIGN_AGAIN_S = 300
"""A URL is signed anew after 5 minutes: botocore renews temporary credentials 10 minutes before they end."""


class SignedUrl(NamedTuple):
    """A URL that gets an object. Its repr shows the signature, so it must not get into a message."""

    url: SplitResult
    """The URL, with the signature in its query."""
    headers: Mapping[str, str]
    """Headers that the signature covers, so that they must be sent."""
    made_at: float
    """When it was signed, by the loop's clock."""


class SignedUrls:
    """Signed URLs by key. It belongs to one event loop.

    Parameters
    ----------
    sign : callable
        Returns the signed URL of a key.
    headers : mapping
        Headers that the signatures cover.
    """

    def __init__(self, sign: Callable[[str], Awaitable[str]], headers: Mapping[str, str]) -> None:
        self._sign = sign
        self._headers = headers
        self._urls: dict[str, SignedUrl] = {}

    async def get(self, key: str) -> SignedUrl:
        """Return the signed URL of a key, signed anew when it is old."""
        now = asyncio.get_running_loop().time()
        urls = self._urls
        signed = urls.get(key)
        if signed is None or now - signed.made_at > _SIGN_AGAIN_S:
            # Into the dictionary from before the wait: `forget` has put another in its place if it came meanwhile.
            signed = urls[key] = SignedUrl(urlsplit(await self._sign(key)), self._headers, now)
        return signed

    def forget(self) -> None:
        """Sign all URLs anew from now on, those that are being signed too."""
        self._urls = {}
