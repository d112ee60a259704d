"""Where a redirect leads, and what goes there with us."""

from urllib.parse import urlsplit

import pytest

from asyncshard.stores.http.failures import Failed
from asyncshard.stores.http.pool import Origin
from asyncshard.stores.http.response import ResponseHead
from asyncshard.stores.s3.transports import host_of, redirected

SIGNED = urlsplit(
    "https://bucket.s3.amazonaws.com/key?X-Amz-Credential=ID&X-Amz-Signature=SIG&X-Amz-Security-Token=T%2F"
)


def follow(location, current=SIGNED):
    return redirected(SIGNED, current, ResponseHead(307, {} if location is None else {"location": location})).geturl()


def test_the_same_server_gets_what_it_says():
    assert follow("https://bucket.s3.amazonaws.com/other?X-Amz-Signature=SIG") == (
        "https://bucket.s3.amazonaws.com/other?X-Amz-Signature=SIG"
    )
    assert follow("/other?X-Amz-Signature=SIG").endswith("/other?X-Amz-Signature=SIG")


@pytest.mark.parametrize(
    "host", ["bucket.s3-eu-west-1.amazonaws.com", "evil.example", "bucket.s3.amazonaws.com:8443", "a:b@evil.example"]
)
def test_another_server_gets_no_credentials_of_ours(host):
    url = follow(f"https://{host}/key?x=1&{SIGNED.query}")
    assert url == f"https://{host.rpartition('@')[2]}/key?x=1"


def test_another_server_may_have_signed_its_own_url():
    location = "https://node-7.storage.internal/key?X-Amz-Signature=THEIRS&X-Amz-Credential=NODE"
    assert follow(location) == location


def test_a_chain_is_compared_with_what_we_signed():
    there = urlsplit("https://evil.example/key")
    assert follow(f"https://evil.example/next?{SIGNED.query}", there) == "https://evil.example/next"


@pytest.mark.parametrize(
    "location",
    [
        None,
        "",
        "http://bucket.s3.amazonaws.com/key",
        "ftp://host/key",
        "https://host:port/key",
        "https://host:99999/key",
        "https://[::1/key",
        "https://host/a key",
        "https://host/\xe9",
        "https://host/key\r\nX: y",
    ],
)
def test_a_redirect_out_of_tls_or_to_nowhere_is_refused(location):
    with pytest.raises(Failed):
        follow(location)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (Origin("https", "minio.internal", 443), "minio.internal"),
        (Origin("http", "minio.internal", 80), "minio.internal"),
        (Origin("http", "minio.internal", 443), "minio.internal:443"),
        (Origin("https", "::1", 9000), "[::1]:9000"),
    ],
)
def test_the_host_is_the_one_that_was_signed(origin, host):
    assert host_of(origin) == host
