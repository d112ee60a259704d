"""The files of a target, their headers, and the place of every tensor in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import asyncshard
from asyncshard import ShardPattern
from asyncshard.errors import CheckpointError
from asyncshard.format.header import Header
from asyncshard.pipeline.writing.reshard.plan import TargetPlan, plan_target
from asyncshard.pipeline.writing.reshard.source import Source
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, WORLD_SIZE_KEY, parse_placements
from asyncshard.plan.division.placements import Placement, Replicate, Shard

TENSORS = {"a": np.zeros((6, 2), "u1"), "b": np.zeros((3, 4), "<i2"), "c": np.zeros(5, "u1")}
PLACEMENTS: dict[str, Placement] = {"a": Shard(0), "b": Shard(1), "c": Replicate()}


def place(name: str, shape: tuple[int, ...]) -> Placement:
    return PLACEMENTS[name]


def plan_ranks(source: Source, world_size: int, place: Any = place, *, max_shard_size: int = 1 << 20) -> TargetPlan:
    return plan_target(
        source, place, world_size=world_size, max_shard_size=max_shard_size, pattern=ShardPattern(), path="path"
    )


def header_of(plan: TargetPlan, number: int) -> Header:
    """Parse the header of a file, whose data are of the size that it says."""
    text = bytes(plan.header(number))
    file = plan.files.files[number]
    nbytes = sum(plan.divisions[plan.division_of[tensor]].slices[file.rank].nbytes for tensor in file.tensors)
    return asyncshard.parse_header(text, len(text) + nbytes)


async def test_each_rank_has_a_header_of_its_pieces(open_single: Any) -> None:
    plan = plan_ranks((await open_single(TENSORS)).join(), 2)
    assert [file.name for file in plan.files.files] == [f"model-rank-{rank}-part-0.safetensors" for rank in (0, 1)]
    for number in (0, 1):
        header = header_of(plan, number)
        assert {name: info.shape for name, info in header.items()} == {"a": (3, 2), "b": (3, 2), "c": (5,)}
        assert next(iter(header)) == "b"  # wider elements first


async def test_the_metadata_of_ranks_say_how_they_are_divided(open_single: Any) -> None:
    plan = plan_ranks((await open_single(TENSORS, {"format": "pt", "x": "y"})).join(), 2)
    metadata = header_of(plan, 0).metadata
    assert dict(parse_placements(metadata.pop(PLACEMENT_KEY), path="")) == {"a": Shard(0), "b": Shard(1)}
    assert metadata == {"format": "pt", "x": "y", WORLD_SIZE_KEY: "2"}


async def test_a_hugging_face_target_has_whole_tensors_and_a_weight_map(open_ranks: Any, placed: Any) -> None:
    halves = {"a": TENSORS["a"][:3], "b": TENSORS["b"][:, :2], "c": TENSORS["c"]}
    source = (await open_ranks(halves, halves, metadata=placed(a=Shard(0), b=Shard(1)))).join()
    plan = plan_target(source, None, world_size=1, max_shard_size=30, pattern=None, path="path")
    found = {name: info.shape for number in (0, 1) for name, info in header_of(plan, number).items()}
    assert found == {name: tensor.shape for name, tensor in TENSORS.items()}
    assert not {PLACEMENT_KEY, WORLD_SIZE_KEY} & header_of(plan, 0).metadata.keys()
    first, second = (file.name for file in plan.files.files)
    assert dict(plan.weight_map()) == {"a": first, "b": second, "c": second}


async def test_without_a_plan_ranks_are_divided_as_the_source_is(open_ranks: Any, placed: Any) -> None:
    half = {"a": TENSORS["a"][:3]}
    plan = plan_ranks((await open_ranks(half, half, metadata=placed(a=Shard(0)))).join(), 3, None)
    assert plan.placements == (Shard(0),)
    assert [header_of(plan, rank)["a"].shape for rank in range(3)] == [(2, 2)] * 3


async def test_the_target_s_map_puts_each_tensor_where_its_header_does(open_single: Any) -> None:
    plan = plan_ranks((await open_single(TENSORS)).join(), 2, max_shard_size=20)
    headers = [header_of(plan, number) for number in range(len(plan.files.files))]
    side = plan.side(np.array([header.size for header in headers], np.int64))
    assert len(headers) > 2
    for tensor, name in enumerate(TENSORS):
        for rank in (0, 1):
            assert side.starts[rank, tensor] == headers[side.files[rank, tensor]][name].start


async def test_an_empty_source_is_an_empty_file_for_each_rank(open_single: Any) -> None:
    plan = plan_ranks((await open_single({})).join(), 2)
    assert [len(header_of(plan, number)) for number in (0, 1)] == [0, 0]


async def test_all_tensors_that_cannot_be_divided_so_are_named_in_one_error(open_single: Any) -> None:
    source = (await open_single(TENSORS)).join()
    with pytest.raises(CheckpointError) as caught:
        plan_ranks(source, 3, lambda name, shape: Shard(1) if name == "c" else Shard(0, pieces=2))
    for name in TENSORS:
        assert f"tensor {name!r}" in str(caught.value)
    assert "pass a tp_plan for 3 ranks" in str(caught.value)
