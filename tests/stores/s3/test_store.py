"""What a store of S3 knows without asking a server: URLs, paths, pins and its own state.

Its verbs are tested against servers, in ``test_faults.py`` and ``test_real_servers.py``.
"""

import json

import pytest

from asyncshard.errors import TruncatedError
from asyncshard.stores.base import ETAG, ObjectMeta
from asyncshard.stores.http.response import Pin
from asyncshard.stores.s3.store import S3Store, split_url

META = ObjectMeta("a.safetensors", 100, Pin('"etag"', 100))


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket", ("bucket", "")),
        ("s3://bucket/", ("bucket", "")),
        ("S3://bucket/a/b", ("bucket", "a/b")),
        ("s3://bucket//a/", ("bucket", "/a/")),
        ("s3://bucket/a%20b?c#d", ("bucket", "a%20b?c#d")),
    ],
)
def test_a_key_is_taken_as_it_stands(url, parts):
    assert split_url(url) == parts


@pytest.mark.parametrize("url", ["s3:///key", "https://bucket/key", "s3://b/key", "s3://-x-/k"])
def test_a_url_without_a_bucket_is_refused_in_words_that_repeat_nothing_of_it(url):
    with pytest.raises(ValueError, match="write s3://bucket/prefix") as caught:
        split_url(url)
    assert url not in str(caught.value)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="holds no credentials: pass them as storage_options") as caught:
        split_url("s3://ID:SECRET@bucket/key")
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://models/llama", "s3://models/llama/"])
async def test_objects_are_named_below_the_prefix(url):
    async with S3Store(url) as store:
        assert store.path_of("a.safetensors") == "s3://models/llama/a.safetensors"


async def test_another_version_bucket_or_server_is_another_identity():
    changed = META._replace(version=Pin('"other"', 100))
    stores = [
        S3Store("s3://models/llama"),
        S3Store("s3://other/llama"),
        S3Store("s3://models/llama", endpoint_url="https://minio.internal:9000"),
    ]
    identities = [store.identity(META) for store in stores] + [stores[0].identity(changed)]
    assert len(set(identities)) == 4
    assert json.loads(identities[0])[2:] == ["models", "llama/a.safetensors", '"etag"', 100]
    assert stores[0].fingerprint(META) == f'{ETAG}"etag" 100'
    assert stores[0].fingerprint(META) == stores[1].fingerprint(META) != stores[0].fingerprint(changed)
    for store in stores:
        await store.aclose()


async def test_bytes_behind_the_end_of_an_object_are_not_asked_for():
    async with S3Store("s3://models/llama") as store:
        with pytest.raises(TruncatedError, match="the object has 100 bytes, not the 101 that are needed") as caught:
            await store.read_into(META, 99, [memoryview(bytearray(2))])
    assert (caught.value.path, caught.value.start, caught.value.stop) == (store.path_of(META.name), 99, 101)


async def test_gaps_are_read_too_unless_every_byte_has_to_be_known():
    for options, max_gap in (({}, 1 << 20), ({"verify_checksums": True}, 0), ({"max_gap_bytes": 5}, 5)):
        async with S3Store("s3://models/llama", max_workers=3, **options) as store:
            assert store.pacing.max_gap_bytes == max_gap
            assert store.pacing.prefetch_count == 6


async def test_the_repr_shows_state_and_load_and_no_secret():
    store = S3Store("s3://models/llama", max_workers=3, key="ID", secret="SECRET")
    assert repr(store) == "<S3Store 's3://models/llama' open, 3 workers, 0 reads in flight>"
    for _ in range(2):
        await store.aclose()
    assert repr(store) == "<S3Store 's3://models/llama' closed, 3 workers, 0 reads in flight>"
