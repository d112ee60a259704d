"""URLs that are signed once for many requests."""

import asyncio

from asyncshard.stores.s3 import signed_urls
from asyncshard.stores.s3.signed_urls import SignedUrls


class Signer:
    """Numbers the signatures; waits for `may_sign` before each."""

    def __init__(self):
        self.count = 0
        self.has_begun = asyncio.Event()
        self.may_sign = asyncio.Event()
        self.may_sign.set()

    async def sign(self, key):
        self.count += 1
        count = self.count
        self.has_begun.set()
        await self.may_sign.wait()
        return f"https://host/{key}?signature={count}"


async def test_a_url_is_signed_once_until_it_is_old(monkeypatch):
    signer = Signer()
    urls = SignedUrls(signer.sign, {"x": "y"})
    first = await urls.get("a")
    assert (first.url.path, first.url.query, first.headers) == ("/a", "signature=1", {"x": "y"})
    assert await urls.get("a") is first
    assert (await urls.get("b")).url.query == "signature=2"
    monkeypatch.setattr(signed_urls, "_SIGN_AGAIN_S", -1)
    assert (await urls.get("a")).url.query == "signature=3"


async def test_a_url_that_was_being_signed_when_all_were_forgotten_is_not_kept():
    signer = Signer()
    signer.may_sign.clear()
    urls = SignedUrls(signer.sign, {})
    signing = asyncio.ensure_future(urls.get("a"))
    await signer.has_begun.wait()
    urls.forget()
    signer.may_sign.set()
    assert (await signing).url.query == "signature=1"
    assert (await urls.get("a")).url.query == "signature=2"
    assert (await urls.get("a")).url.query == "signature=2"
