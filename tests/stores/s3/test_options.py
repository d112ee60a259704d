"""What a store can be told."""

from dataclasses import fields

import pytest

from asyncshard.loaders.options import Options
from asyncshard.stores import Pacing, from_url
from asyncshard.stores.s3 import S3Store
from asyncshard.stores.s3.options import S3Options

SECRETS = {"aws_access_key_id": "AKID-x", "aws_secret_access_key": "SECRET-x", "aws_session_token": "TOKEN-x"}


def make(**options):
    return S3Options.from_keywords(options)


def test_the_names_of_s3fs_are_understood():
    assert make(key="k", secret="s", token="t") == make(
        aws_access_key_id="k", aws_secret_access_key="s", aws_session_token="t"
    )
    assert make(anon=True) == make(unsigned=True)


def test_none_is_as_good_as_not_given():
    assert make(**{item.name: None for item in fields(S3Options)}) == make()


@pytest.mark.parametrize("options", [{"bucket": "x"}, {"aws_access_key": "k"}, {"client_kwargs": {}}])
def test_an_unknown_option_is_an_error_that_lists_the_known(options):
    with pytest.raises(TypeError, match=f"unknown storage option {next(iter(options))}; .*aws_access_key_id"):
        from_url("s3://bucket/key", **options)


def test_an_option_under_two_names_is_an_error():
    with pytest.raises(TypeError, match="aws_access_key_id is given twice") as caught:
        make(key="one", aws_access_key_id="two", secret="s")
    assert "two" not in str(caught.value).replace("twice", "")


@pytest.mark.parametrize(
    "options",
    [
        {"key": "k"},
        {"secret": "s"},
        {"unsigned": True, "key": "k", "secret": "s"},
        {"addressing_style": "other"},
        {"transport": "carrier pigeon"},
        {"max_attempts": 0},
        {"connect_timeout_s": 0},
        {"read_timeout_s": -1},
        {"deadline_s": float("inf")},
        {"deadline_s": float("nan")},
        {"max_gap_bytes": -1},
        {"max_gap_bytes": 1, "verify_checksums": True},
        {"endpoint_url": "minio:9000"},
        {"endpoint_url": "ftp://minio"},
        {"endpoint_url": "https://"},
        {"endpoint_url": "https://user:SECRET-x@minio"},
    ],
)
def test_what_is_out_of_range_is_an_error_before_anything_is_sent(options):
    with pytest.raises(ValueError) as caught:
        S3Store("s3://bucket/key", **options)
    assert "SECRET-x" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"aws_secret_access_key": b"SECRET-x", "aws_access_key_id": "k"},
        {"unsigned": "yes"},
        {"verify": 1.5},
        {"max_attempts": 2.0},
        {"max_attempts": True},
        {"read_timeout_s": "5"},
        {"endpoint_url": 7},
    ],
)
def test_what_has_the_wrong_type_is_an_error(options):
    with pytest.raises(TypeError) as caught:
        S3Store("s3://bucket/key", **options)
    assert "SECRET-x" not in str(caught.value)


def test_no_repr_shows_a_secret():
    store = S3Store("s3://bucket/key", **SECRETS)
    loader_options = Options(storage_options=SECRETS)
    text = f"{store!r} {store.url} {make(**SECRETS)!r} {loader_options!r}"
    assert "-x" not in text


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///key", "s3://b/key", "s3://bu cket/key", "s3://AKID:SEC/RET@bucket/key", "s3://A:S@bucket/"]
)
def test_a_url_without_a_valid_bucket_is_an_error_that_does_not_repeat_it(url):
    with pytest.raises(ValueError) as caught:
        from_url(url)
    assert "RET" not in str(caught.value)
    assert "A:S" not in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "style"),
    [
        (None, "auto"),
        ("https://s3.eu-west-1.amazonaws.com", "auto"),
        ("https://minio.internal:9000", "auto"),
        ("http://127.0.0.1:9000", "path"),
        ("http://[::1]:9000", "path"),
        ("http://localhost:9000", "path"),
    ],
)
def test_a_bucket_is_not_put_before_an_address(endpoint, style):
    assert make().style_for(endpoint) == style
    assert make(addressing_style="virtual").style_for(endpoint) == "virtual"


def test_a_store_has_defaults_of_its_own():
    store = from_url("s3://bucket/key")
    assert (store.max_workers, store.pacing) == (16, Pacing(8 << 20, 32, 1 << 20))
    store = from_url("s3://bucket/key", max_workers=3, verify_checksums=True)
    assert (store.max_workers, store.pacing) == (3, Pacing(8 << 20, 6, 0))
    assert from_url("s3://bucket/key", max_gap_bytes=5).pacing.max_gap_bytes == 5
