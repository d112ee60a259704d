"""What the metadata of rank shards say of their division, and where they contradict each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncshard.errors import CheckpointError
from asyncshard.pipeline.writing.reshard.written_placements import (
    has_placements,
    refuse_single_rank_file,
    written_placements,
)
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, WORLD_SIZE_KEY
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.text import Problems

TENSORS = {"a": np.zeros((2, 2), "u1"), "b": np.zeros(3, "u1")}
TWO = (TENSORS, TENSORS)


async def test_files_that_say_nothing_have_no_placements(open_ranks: Any) -> None:
    checkpoints = (await open_ranks(*TWO)).checkpoints
    faults = Problems("path")
    assert written_placements(checkpoints, faults) is None
    assert not has_placements(checkpoints[0])
    faults.require_none()


async def test_files_that_agree_give_the_placements_of_divided_tensors(open_ranks: Any, placed: Any) -> None:
    metadata = {**placed(a=Shard(0)), WORLD_SIZE_KEY: "2"}
    checkpoints = (await open_ranks(*TWO, metadata=metadata)).checkpoints
    faults = Problems("path")
    assert written_placements(checkpoints, faults) == {"a": Shard(0)}
    assert has_placements(checkpoints[0])
    faults.require_none()


async def faults_of(open_ranks: Any, *metadata: dict[str, str] | None) -> str:
    """Return what is wrong with as many ranks."""
    checkpoints = (await open_ranks(*[TENSORS] * len(metadata), metadata=list(metadata))).checkpoints
    faults = Problems("path")
    written_placements(checkpoints, faults)
    with pytest.raises(CheckpointError) as caught:
        faults.require_none()
    return str(caught.value)


async def test_a_silent_file_among_others_is_named(open_ranks: Any, placed: Any) -> None:
    text = await faults_of(open_ranks, placed(), None)
    assert "model-rank-1-part-0.safetensors has no metadata" in text
    assert "model-rank-0-part-0.safetensors has no metadata" not in text


async def test_a_tensor_that_two_ranks_place_differently_is_named_with_both_placements(
    open_ranks: Any, placed: Any
) -> None:
    text = await faults_of(open_ranks, placed(a=Shard(0), b=Shard(0)), placed(a=Shard(1)))
    assert "tensor 'a' is placed by Shard(dim=0, pieces=None) on rank 0 and by Shard(dim=1, pieces=None)" in text
    assert "tensor 'b' is placed by Shard(dim=0, pieces=None) on rank 0 and by Replicate() on rank 1" in text


async def test_placements_that_cannot_be_read_are_a_fault_of_their_file(open_ranks: Any, placed: Any) -> None:
    text = await faults_of(open_ranks, placed(), {PLACEMENT_KEY: "no json"})
    assert f"model-rank-1-part-0.safetensors: the metadata {PLACEMENT_KEY!r} cannot be read" in text


async def test_files_of_two_worlds_are_a_fault(open_ranks: Any, placed: Any) -> None:
    one, other = ({**placed(), WORLD_SIZE_KEY: count} for count in ("2", "4"))
    assert "its files are of worlds of 2 and of 4 ranks" in await faults_of(open_ranks, one, other)


async def test_a_world_whose_files_are_not_all_there_is_a_fault(open_ranks: Any, placed: Any) -> None:
    metadata = {**placed(), WORLD_SIZE_KEY: "4"}
    text = await faults_of(open_ranks, metadata, metadata)
    assert "it is of a world of 4 ranks, and holds the files of 2" in text


@pytest.mark.parametrize(("world", "is_fault"), [(None, False), ("1", False), ("2", True)])
async def test_a_single_file_may_not_be_one_rank_s_of_several(
    open_single: Any, world: str | None, is_fault: bool
) -> None:
    metadata = None if world is None else {WORLD_SIZE_KEY: world}
    (checkpoint,) = (await open_single(TENSORS, metadata)).checkpoints
    faults = Problems("path")
    refuse_single_rank_file(checkpoint.shards, faults)
    if is_fault:
        with pytest.raises(CheckpointError, match="a rank's part of a world of 2: pass the directory"):
            faults.require_none()
    else:
        faults.require_none()
