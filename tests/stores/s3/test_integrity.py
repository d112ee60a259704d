"""`verify_checksums`: what was read, against the checksum that the server has of each object."""

import base64
import zlib

import numpy as np
import pytest
from awscrt import checksums

import asyncshard
from asyncshard import ShardedStateLoader
from asyncshard.errors import ChecksumError
from asyncshard.events import Retried, Unverified, Verified
from asyncshard.stores.s3 import S3Store
from asyncshard.testing import S3Fault, S3Server

URL = "s3://models/checkpoint/model.safetensors"


def encoded(value, nbytes):
    return base64.b64encode(value.to_bytes(nbytes, "big")).decode()


VALUES = {
    "crc32": lambda data: encoded(zlib.crc32(data), 4),
    "crc32c": lambda data: encoded(checksums.crc32c(data), 4),
    "crc64nvme": lambda data: encoded(checksums.crc64nvme(data), 8),
}


@pytest.fixture
async def server():
    async with S3Server() as server:
        yield server


@pytest.fixture
def tensors(checkpoints):
    return checkpoints.tensors(40, nbytes=50_000)


def options_on(server, **more):
    keys = {"key": "id", "secret": "secret", "region_name": "us-east-1"}
    return {"endpoint_url": server.endpoint_url, "verify_checksums": True, **keys, **more}


def put(server, data, name="crc32", value=None, kind="FULL_OBJECT"):
    headers = {f"x-amz-checksum-{name}": value or VALUES[name](data), "x-amz-checksum-type": kind}
    server.put("models", "checkpoint/model.safetensors", data, headers=headers)


def is_data(request):
    return "if-match" in request.headers and request.method == "GET"


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("transport", ["sockets", "aiobotocore"])
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("in_place", [True, False])
async def test_an_object_that_was_read_in_ranges_is_compared_as_a_whole(
    server, checkpoints, tensors, name, transport, in_place
):
    put(server, checkpoints.shard(tensors), name)
    options = {"storage_options": options_on(server, transport=transport), "chunk_size": 1 << 16}
    into = {name: np.zeros_like(tensor) for name, tensor in tensors.items()} if in_place else None
    async with asyncshard.stream(URL, into, **options) as weights:
        assert len([name async for name, _ in weights]) == 40
        statistics = weights.statistics()
    assert (statistics.verified, statistics.unverified) == ((URL,), ())


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("crc32", "COMPOSITE", "AAAAAA==-2"),
        ("crc32", "COMPOSITE", "AAAAAA=="),
        ("sha256", "FULL_OBJECT", base64.b64encode(bytes(32)).decode()),
        ("sha1", "FULL_OBJECT", "AAAAAA=="),
    ],
)
async def test_what_cannot_be_compared_is_said(server, checkpoints, tensors, name, kind, value):
    put(server, checkpoints.shard(tensors), name, value, kind)
    async with asyncshard.stream(URL, storage_options=options_on(server)) as weights:
        async for _ in weights:
            pass
        statistics = weights.statistics()
    assert (statistics.verified, statistics.unverified) == ((), (URL,))


async def test_a_bit_that_flips_on_the_way_is_an_error_that_names_its_range(server, checkpoints, tensors):
    data = checkpoints.shard(tensors)
    put(server, data)

    def when(request):
        start, stop = request.byte_range or (0, 0)
        fault.body = flipped(data, start + 5)[start:stop]
        return is_data(request) and start > len(data) // 2

    fault = S3Fault(when=when)
    server.faults.append(fault)
    loader = ShardedStateLoader(storage_options=options_on(server), chunk_size=1 << 17)
    with pytest.raises(ChecksumError, match="differently") as caught:
        await loader.load_weights(URL)
    assert caught.value.retryable
    assert caught.value.start > len(data) // 2
    await loader.load_weights(URL)


async def test_an_object_that_does_not_match_its_checksum_is_an_error_that_stays(server, checkpoints, tensors):
    put(server, checkpoints.shard(tensors), value=VALUES["crc32"](b"other"))
    with pytest.raises(ChecksumError, match="upload it anew") as caught:
        await asyncshard.load(URL, storage_options=options_on(server))
    assert not caught.value.retryable


async def test_a_small_object_that_came_wrong_is_read_again(server):
    data = bytes(range(100))
    put(server, data)
    server.faults.append(S3Fault(body=flipped(data, 7), when=is_data))
    events = []
    async with S3Store("s3://models/checkpoint", **options_on(server)) as store:
        with store.reporting_to(events.append):
            meta, _ = await store.open("model.safetensors", 0)
            memory = bytearray(100)
            await store.read_into(meta, 0, [memoryview(memory)])
        assert memory == data
    assert [type(event) for event in events] == [Unverified, Unverified, Retried, Verified]


async def test_a_checksum_in_the_answer_to_a_range_is_not_taken_for_the_ranges(server, checkpoints, tensors):
    data = checkpoints.shard(tensors)
    put(server, data)
    headers = {"x-amz-checksum-crc32": VALUES["crc32"](data)}
    server.faults.append(S3Fault(headers=headers, times=None, when=is_data))
    await asyncshard.load(URL, storage_options=options_on(server), chunk_size=1 << 16)


async def test_nothing_is_asked_or_compared_without_the_option(server, checkpoints, tensors):
    put(server, checkpoints.shard(tensors), value=VALUES["crc32"](b"other"))
    await asyncshard.load(URL, storage_options=options_on(server, verify_checksums=False))
    assert not [request for request in server.requests if "x-amz-checksum-mode" in request.headers]
