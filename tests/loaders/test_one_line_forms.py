"""``asyncshard.load`` and ``asyncshard.stream``."""

import numpy as np
import pytest

import asyncshard
from asyncshard.errors import NamesError

WEIGHTS = {"a": np.arange(6, dtype=np.float32), "b": np.arange(3, dtype=np.int64)}


async def test_load_returns_a_dict(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, WEIGHTS)
    got = await asyncshard.load(tmp_path)
    assert type(got) is dict
    assert checkpoints.same(got, WEIGHTS)


async def test_stream_yields_one_tensor_after_the_other(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, WEIGHTS)
    async with asyncshard.stream(tmp_path) as weights:
        assert [(name, tensor.tolist()) async for name, tensor in weights] == [
            (name, array.tolist()) for name, array in WEIGHTS.items()
        ]


async def test_options_are_those_of_the_loader(tmp_path, checkpoints):
    for rank in range(2):
        checkpoints.write_ranks(tmp_path, {"w": np.array([rank])}, rank=rank)
    options = {"rank": 1, "world_size": 2, "memory_budget_mb": 1, "prefetch_count": 1, "max_workers": 1}
    assert (await asyncshard.load(tmp_path, **options))["w"].tolist() == [1]
    assert [tensor.tolist() async for _, tensor in asyncshard.stream(tmp_path, **options)] == [[1]]


async def test_stream_takes_destinations(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, WEIGHTS)
    into = {"a": np.zeros(6), "c": np.zeros(1)}
    with pytest.raises(NamesError):
        await asyncshard.stream(tmp_path, into)
    statistics = await asyncshard.stream(tmp_path, into, strict=False, cast=True).drain()
    assert into["a"].tolist() == list(range(6))
    assert (statistics.missing, statistics.unexpected) == (("c",), ("b",))


async def test_an_unknown_option_is_an_error_at_the_call(tmp_path):
    with pytest.raises(TypeError, match="nonsense"):
        asyncshard.stream(tmp_path, nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        await asyncshard.load(tmp_path, nonsense=1)


async def test_a_stream_that_is_never_used_touches_nothing(tmp_path):
    asyncshard.stream(tmp_path / "not there")
