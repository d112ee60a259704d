"""The client signs, lists and asks for metadata, and turns botocore's errors into failures. Also tests `assembly`.

What it does for credentials, clocks, regions and certificates is tested in ``test_faults.py``.
"""

import contextlib
import logging

import botocore.exceptions as botocore
import pytest

from asyncshard.errors import AccessDeniedError, ObjectNotFoundError, StoreError, StoreTimeoutError, TruncatedError
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.s3 import assembly
from asyncshard.stores.s3.client import S3Client, _failure_of_botocore
from asyncshard.stores.s3.options import S3Options
from asyncshard.stores.s3.transports import BotoTransport, SocketTransport
from asyncshard.testing import S3Server

SECRET = "wJalrXUtnFEMI-K7MDENG"


@pytest.fixture
async def server():
    async with S3Server(max_keys=2) as server:
        yield server


def options_for(server, **more):
    return S3Options.from_keywords(
        {"endpoint_url": server.endpoint_url, "key": "ID", "secret": SECRET, "region_name": "us-east-1", **more}
    )


@contextlib.asynccontextmanager
async def client_of(server, *, bucket="models", **options):
    client = S3Client(options_for(server, **options), bucket, 2)
    try:
        await client.start()
        yield client
    finally:
        await client.aclose()


async def test_a_listing_comes_page_by_page_without_folders_and_the_prefix_itself(server):
    for key in ("p/", "p/a", "p/b", "p/c", "p/folder/d", "q"):
        server.put("models", key, b"x")
    pages, token = [], None
    async with client_of(server) as client:
        while not pages or token is not None:
            names, token = await client.list_page("p/", token)
            pages.append(names)
    assert len(pages) > 1
    assert [name for page in pages for name in page] == ["a", "b", "c"]


async def test_metadata_are_a_pin_and_the_headers(server):
    server.put("models", "a", b"12345")
    async with client_of(server) as client:
        pin, headers = await client.head("a")
        assert pin.size == 5
        assert pin.etag == headers["etag"]
        with pytest.raises(Failed) as caught:
            await client.head("b")
    assert caught.value.failure.kind is ObjectNotFoundError


async def test_a_url_is_signed_for_one_object_and_holds_no_secret(server):
    async with client_of(server) as client:
        signed = await client.urls.get("folder/a b")
    assert signed.url.path == "/models/folder/a%20b"
    assert "X-Amz-Signature=" in signed.url.query
    assert SECRET not in signed.url.geturl()


async def test_the_first_of_several_requests_applies_the_remedy_for_all(server):
    failure = Failure("elsewhere", action=Action.CHANGE_REGION, region="eu-west-1")
    async with client_of(server) as client:
        before = await client.urls.get("a")
        for _ in range(3):
            await client.remedy(failure, 0)
        assert (client.generation, client.region) == (1, "eu-west-1")
        after = await client.urls.get("a")
    assert ("us-east-1" in before.url.query, "eu-west-1" in after.url.query) == (True, True)


async def test_buckets_and_proxies_that_our_own_connections_cannot_serve_are_told(server, monkeypatch):
    async with client_of(server) as client:
        assert client.reason_against_sockets() is None
        monkeypatch.setenv("HTTP_PROXY", "http://proxy.test.invalid")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert client.reason_against_sockets() == "a proxy is configured"


@pytest.mark.parametrize(
    ("error", "kind", "action"),
    [
        (botocore.NoCredentialsError(), AccessDeniedError, Action.GIVE_UP),
        (botocore.ProfileNotFound(profile="p"), AccessDeniedError, Action.GIVE_UP),
        (botocore.ReadTimeoutError(endpoint_url="u"), StoreTimeoutError, Action.RETRY),
        (botocore.ConnectTimeoutError(endpoint_url="u"), StoreTimeoutError, Action.RETRY),
        (botocore.SSLError(endpoint_url="u", error="e"), StoreError, Action.GIVE_UP),
        (botocore.IncompleteReadError(actual_bytes=1, expected_bytes=2), TruncatedError, Action.RETRY),
        (botocore.EndpointConnectionError(endpoint_url="u"), StoreError, Action.RETRY),
        (botocore.ParamValidationError(report="r"), ObjectNotFoundError, Action.GIVE_UP),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_botocore_is_a_failure_of_its_kind(error, kind, action):
    failure = _failure_of_botocore(error)
    assert (failure.kind, failure.action) == (kind, action)


@pytest.mark.parametrize(
    ("bucket", "transport", "kind", "is_told"),
    [
        ("models", "auto", SocketTransport, False),
        ("models", "sockets", SocketTransport, False),
        ("models", "aiobotocore", BotoTransport, False),
        ("models--use1-az1--x-s3", "auto", BotoTransport, True),
    ],
)
async def test_a_reader_is_put_together_with_the_transport_that_serves_the_bucket(
    server, bucket, transport, kind, is_told, caplog
):
    caplog.set_level(logging.INFO, "asyncshard")
    reader = assembly.make_reader(options_for(server, transport=transport), bucket, 2, print)
    try:
        await reader._client.start()
        made = reader._make_transport()
        assert type(made) is kind
        await made.aclose()
    finally:
        await reader.aclose()
    assert ("reading through aiobotocore, since" in caplog.text) == is_told
