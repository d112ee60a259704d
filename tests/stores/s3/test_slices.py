"""Slices of objects: through covering reads and single ranges, on a server that fails."""

import numpy as np
import pytest

from asyncshard import AsyncShardLoader, IncrementalShardLoader, ShardedStateLoader
from asyncshard.plan.division.placements import Shard
from asyncshard.testing import S3Fault, S3Server

WORLD = 8
PLAN = {"layers.*.q": Shard(0), "layers.*.o": Shard(1), "layers.*.deep": Shard(-1)}
DIMS = {"q": 0, "o": 1, "deep": 2}


@pytest.fixture
async def server():
    async with S3Server() as server:
        yield server


@pytest.fixture
def tensors():
    random = np.random.default_rng(0)
    shapes = {"q": (64, 100), "o": (15, 512), "deep": (2, 5, 64), "norm": (300,)}
    return {
        f"layers.{number}.{name}.weight": random.integers(0, 1000, shape).astype("<i2")
        for number in range(2)
        for name, shape in shapes.items()
    }


def options_on(server, **more):
    keys = {"key": "id", "secret": "secret", "region_name": "us-east-1"}
    return {"endpoint_url": server.endpoint_url, **keys, **more}


def put(server, checkpoints, tensors):
    names = list(tensors)
    halves = [{name: tensors[name] for name in names[:5]}, {name: tensors[name] for name in names[5:]}]
    for name, data in checkpoints.hugging_face_files(*halves).items():
        server.put("models", f"m/{name}", data)
    return "s3://models/m"


def is_data(request):
    return "if-match" in request.headers and request.method == "GET"


@pytest.mark.parametrize("max_gap", [None, 0, 200])
@pytest.mark.parametrize("is_faulty", [False, True])
async def test_all_ranks_put_together_are_the_whole(server, checkpoints, tensors, max_gap, is_faulty):
    url = put(server, checkpoints, tensors)
    more = {} if max_gap is None else {"max_gap_bytes": max_gap}
    parts = []
    for rank in range(WORLD):
        if is_faulty:
            server.faults.append(S3Fault(times=2, cut_after=50, when=is_data))
        loader = ShardedStateLoader(
            rank=rank,
            world_size=WORLD,
            tp_plan=PLAN,
            chunk_size=4_000,
            memory_budget_mb=2,
            storage_options=options_on(server, **more),
        )
        parts.append(await loader.load_weights(url))
        if rank == 3:
            got = {}
            async with AsyncShardLoader(loader).stream(url) as weights:
                got.update({name: np.array(tensor) async for name, tensor in weights})
            assert checkpoints.same(got, {name: np.ascontiguousarray(part) for name, part in parts[-1].items()})
            shard = await IncrementalShardLoader(loader).load_shard(f"{url}/model-00001-of-00002.safetensors")
            assert checkpoints.same(shard, {name: got[name] for name in shard})
        assert loader.budget.bytes_used == 0
    for name, whole in tensors.items():
        kind = name.split(".")[2]
        if kind in DIMS:
            assert np.array_equal(np.concatenate([part[name] for part in parts], DIMS[kind]), whole)
        else:
            assert all(np.array_equal(part[name], whole) for part in parts)
