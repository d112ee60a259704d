"""The store against servers that others wrote."""

import numpy as np
import pytest
from safetensors.numpy import save

import asyncshard
from asyncshard import AsyncShardLoader, ShardedStateLoader
from asyncshard.errors import AccessDeniedError, ObjectChangedError, ObjectNotFoundError, StoreError
from asyncshard.stores.s3 import S3Store
from asyncshard.testing import StoreTests

TRANSPORTS = ("sockets", "aiobotocore")


class OnServer(StoreTests):
    """What every store must do, on a real server."""

    transport = "sockets"

    @pytest.fixture(autouse=True)
    def _prepare(self, bucket, prefix):
        self.bucket, self.prefix = bucket, prefix

    async def make_store(self, files):
        url = self.bucket.put_all(self.prefix, files)
        return S3Store(url, transport=self.transport, **self.bucket.storage_options)

    async def replace(self, store, name, data):
        self.bucket.put(f"{self.prefix}/{name}", data)

    async def remove(self, store, name):
        self.bucket.remove(f"{self.prefix}/{name}")


class TestOnSeaweedFS(OnServer):
    @pytest.fixture
    def bucket(self, seaweed):
        return seaweed


class TestOnMoto(OnServer):
    @pytest.fixture
    def bucket(self, moto):
        return moto


class TestOnSeaweedFSThroughAiobotocore(TestOnSeaweedFS):
    transport = "aiobotocore"


# Loading


@pytest.fixture
def tensors(checkpoints):
    return checkpoints.tensors(40, nbytes=100_000) | {"empty": np.empty((0, 4), np.float32)}


def options_of(bucket, **more):
    return {"storage_options": {**bucket.storage_options, **more}}


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_rank_shards_load_in_every_way(seaweed, prefix, checkpoints, tensors, transport):
    names = list(tensors)
    parts = [{name: tensors[name] for name in names[at::3]} for at in range(3)]
    url = seaweed.put_all(prefix, checkpoints.rank_files(*parts))
    expected = {name: tensors[name] for part in parts for name in part}
    loader = ShardedStateLoader(chunk_size=1 << 16, **options_of(seaweed, transport=transport))
    assert await loader.discover_shards(url) == [f"{url}/model-rank-0-part-{part}.safetensors" for part in range(3)]
    assert checkpoints.same(await loader.load_weights(url), expected)
    state = {name: np.zeros_like(tensor) for name, tensor in expected.items()}
    await loader.load_weights(url, state)
    assert checkpoints.same(state, expected)
    async with AsyncShardLoader(loader, memory_budget_mb=1).stream(url) as weights:
        assert checkpoints.same({name: tensor.copy() async for name, tensor in weights}, expected)
    assert checkpoints.same({name: tensor async for name, tensor in loader.iterate_weights(url)}, expected)


async def test_a_hugging_face_prefix_loads(moto, prefix, checkpoints, tensors):
    names = list(tensors)
    shards = [{name: tensors[name] for name in names[at::2]} for at in range(2)]
    url = moto.put_all(prefix, checkpoints.hugging_face_files(*shards))
    assert checkpoints.same(await asyncshard.load(f"{url}/", **options_of(moto)), {**shards[0], **shards[1]})


async def test_one_object_loads_and_shows_its_header(seaweed, prefix, checkpoints, tensors):
    seaweed.put(f"{prefix}/one.safetensors", save(tensors))
    url = f"s3://{seaweed.name}/{prefix}/one.safetensors"
    header = await asyncshard.read_header(url, **options_of(seaweed))
    assert set(header) == set(tensors)
    loaded = await asyncshard.load(url, **options_of(seaweed))
    assert all(np.array_equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("key", ["a b", "a+b", "a%20b", "é", "a?b#c&d=e", "a//b", "~'()*!"])
async def test_keys_are_taken_as_they_stand(seaweed, prefix, checkpoints, key):
    if key == "a//b":
        pytest.skip("SeaweedFS, a file system below, has no empty folder names")
    tensors = checkpoints.tensors(2)
    url = seaweed.put_all(f"{prefix}/{key}", checkpoints.rank_files(tensors))
    assert checkpoints.same(await asyncshard.load(url, **options_of(seaweed)), tensors)


async def test_more_objects_than_a_page_holds_are_listed(moto, prefix, checkpoints):
    tensors = checkpoints.tensors(1)
    for number in range(1005):
        moto.put(f"{prefix}/note-{number:04}", b"")
    moto.put_all(prefix, checkpoints.rank_files(tensors))
    moto.put(f"{prefix}/below/model-rank-0-part-1.safetensors", b"not here")
    async with S3Store(f"s3://{moto.name}/{prefix}", **moto.storage_options) as store:
        assert len((await store.list()).names) == 1006
    assert checkpoints.same(await asyncshard.load(f"s3://{moto.name}/{prefix}", **options_of(moto)), tensors)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_object_replaced_in_mid_load_is_an_error(seaweed, prefix, checkpoints, transport):
    tensors = checkpoints.tensors(8, nbytes=1 << 20)
    url = seaweed.put_all(prefix, checkpoints.rank_files(tensors))
    options = options_of(seaweed, transport=transport)
    with pytest.raises(ObjectChangedError, match="replaced"):
        async with asyncshard.stream(url, memory_budget_mb=2, **options) as weights:
            async for name, tensor in weights:
                assert np.array_equal(tensor, tensors[name])
                seaweed.put_all(prefix, checkpoints.rank_files(checkpoints.tensors(8, nbytes=1 << 20, seed=1)))


@pytest.mark.parametrize("server", ["seaweed", "moto"])
async def test_what_is_not_there_is_said(server, prefix, request):
    bucket = request.getfixturevalue(server)
    with pytest.raises(ObjectNotFoundError, match=f"{prefix}.*check the prefix|{prefix}.*check the key"):
        await asyncshard.load(f"s3://{bucket.name}/{prefix}", **options_of(bucket))
    with pytest.raises(ObjectNotFoundError, match="no-such-bucket"):
        await asyncshard.load(f"s3://no-such-bucket/{prefix}/", **options_of(bucket))


async def test_a_wrong_secret_is_denied_and_not_shown(seaweed, prefix):
    options = options_of(seaweed, aws_secret_access_key="wrong-secret")
    with pytest.raises(AccessDeniedError, match="aws_secret_access_key") as caught:
        await asyncshard.load(f"s3://{seaweed.name}/{prefix}/", **options)
    assert (caught.value.status, caught.value.attempts, caught.value.bucket) == (403, 1, seaweed.name)
    assert "wrong-secret" not in f"{caught.value!r} {caught.value} {caught.value.__dict__}"


async def test_an_unknown_key_is_denied(seaweed, prefix):
    with pytest.raises(AccessDeniedError, match="aws_access_key_id"):
        await asyncshard.load(f"s3://{seaweed.name}/{prefix}/", **options_of(seaweed, aws_access_key_id="unknown"))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_server_that_ignores_ranges_gives_a_clear_error_or_the_right_bytes(
    rclone, prefix, checkpoints, transport
):
    tensors = checkpoints.tensors(8, nbytes=1 << 18)
    url = rclone.put_all(prefix, checkpoints.rank_files(tensors))
    try:
        loaded = await asyncshard.load(url, **options_of(rclone, transport=transport))
    except StoreError as error:
        said = str(error)
    else:
        said = "range" if checkpoints.same(loaded, tensors) else "wrong bytes"
    assert "range" in said
