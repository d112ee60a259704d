"""The version of a checkpoint as a value: text, pickle, equality, and what it says of another one."""

import asyncio
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, CheckpointVersion, ShardedStateLoader, save_sharded_state
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.testing import MemoryStore


@pytest.fixture(scope="session")
def tensors(checkpoints):
    tensors = checkpoints.tensors(6, nbytes=64)
    return {**tensors, "näme \u2028\n": np.zeros((2, 3), np.int8), "scalar": np.array(1.5)}


async def version_of(path):
    async with AsyncShardLoader(memory_budget_mb=1).stream(path) as stream:
        return stream.version


@pytest.fixture
async def version(tmp_path, tensors):
    await save_sharded_state(tensors, tmp_path, rank=0, digests=True, max_shard_size=128)
    return await version_of(tmp_path)


async def test_text_and_pickle_give_the_same_version_back(version):
    for copy in (CheckpointVersion.parse(str(version)), pickle.loads(pickle.dumps(version))):
        assert copy == version
        assert hash(copy) == hash(version)
        assert str(copy) == str(version)
        assert [shard.facts for shard in copy.shards] == [shard.facts for shard in version.shards]
    assert version != CheckpointVersion.parse('{"asyncshard_version": 1, "shards": 0}')
    assert version != "another kind of thing"


async def test_a_version_crosses_processes(version, tmp_path):
    program = """
import asyncio, sys
from asyncshard import AsyncShardLoader, CheckpointVersion
async def main():
    async with AsyncShardLoader(memory_budget_mb=1).stream(sys.argv[1]) as stream:
        version = stream.version
    assert version == CheckpointVersion.parse(sys.stdin.read())
    sys.stdout.write(str(version))
asyncio.run(main())
"""
    result = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", program, str(tmp_path)],
        input=str(version),
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    assert result.stdout == str(version)


async def test_every_way_of_loading_has_the_same_version(version, tmp_path, tensors):
    loader = ShardedStateLoader()
    await loader.load_weights(tmp_path)
    assert loader.last_report.version == version
    await loader.load_weights(tmp_path, {name: np.zeros_like(tensor) for name, tensor in tensors.items()})
    assert loader.last_report.version == version
    streams = AsyncShardLoader()
    await streams.load_weights_async(tmp_path)
    assert streams.last_report.version == version
    async with loader.iterate_weights(tmp_path) as stream:
        assert stream.version == version


async def test_a_stream_that_is_not_open_has_no_version(tmp_path):
    stream = AsyncShardLoader().stream(tmp_path)
    with pytest.raises(RuntimeError, match="not open"):
        stream.version  # noqa: B018
    await stream.aclose()


async def test_facts_are_dtype_shape_and_digest(version):
    facts = {name: fact for shard in version.shards for name, fact in shard.facts.items()}
    assert facts["näme \u2028\n"].startswith("I8 2,3 ")
    assert facts["scalar"].startswith("F64  ")
    assert len({fact.split(" ")[2] for fact in facts.values()}) == len(facts)


async def test_a_shard_without_digests_or_with_malformed_ones_has_no_facts(checkpoints, tensors):
    for metadata in (None, {DIGESTS_KEY: "00"}):
        store = MemoryStore({"model.safetensors": checkpoints.shard(tensors, metadata=metadata)})
        version = await version_of(store)
        assert [shard.facts for shard in version.shards] == [None]
        assert CheckpointVersion.parse(str(version)) == version


async def test_a_version_may_have_many_tensors(checkpoints, tmp_path):
    await save_sharded_state({f"t{i}": np.array([i], np.int32) for i in range(2000)}, tmp_path, rank=0, digests=True)
    version = await version_of(tmp_path)
    assert len(version.shards[0].facts) == 2000
    assert CheckpointVersion.parse(str(version)) == version


GOOD = [
    '{"asyncshard_version": 1, "shards": 1}',
    '{"path": "/a", "fingerprint": null, "tensors": 1}',
    '{"w": "F32 2,3 0123456789abcdef0123456789abcdef"}',
]


def test_the_text_of_a_version_is_kept_from_release_to_release():
    version = CheckpointVersion.parse("\n".join(GOOD))
    assert version.shards[0].facts == {"w": "F32 2,3 0123456789abcdef0123456789abcdef"}
    assert str(version) == "\n".join(GOOD)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["nonsense"],
        ["[]"],
        ['{"asyncshard_version": 2, "shards": 0}'],
        ['{"asyncshard_version": 1}'],
        ['{"asyncshard_version": 1, "shards": -1}'],
        ['{"asyncshard_version": 1, "shards": true}', *GOOD[1:]],
        GOOD[:1],
        GOOD[:2],
        [*GOOD, GOOD[2]],
        [GOOD[0], GOOD[1].replace("1}", "2}"), GOOD[2]],
        [GOOD[0], GOOD[1].replace("1}", "0}"), GOOD[2]],
        [GOOD[0], GOOD[1].replace('"/a"', "3"), GOOD[2]],
        [GOOD[0], GOOD[1].replace("null", "3"), GOOD[2]],
        [*GOOD[:2], GOOD[2].replace("2,3", "2,,3")],
        [*GOOD[:2], GOOD[2].replace("abcdef0", "ABCDEF0")],
        [*GOOD[:2], '{"w": 3}'],
        [*GOOD[:2], "{}"],
    ],
)
def test_text_that_is_no_version_is_an_error(lines):
    with pytest.raises(ValueError, match="not the text of a version"):
        CheckpointVersion.parse("\n".join(lines))


def test_parsing_anything_but_text_is_a_type_error():
    with pytest.raises(TypeError, match="str"):
        CheckpointVersion.parse(b"{}")
