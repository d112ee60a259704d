"""A copy brings every byte of the source's tensors to its place in the target's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from asyncshard import ShardPattern
from asyncshard._core import StopFlag
from asyncshard.errors import TruncatedError
from asyncshard.pipeline.writing.reshard.block_copy import Copy
from asyncshard.pipeline.writing.reshard.block_reader import BlockBuffers
from asyncshard.pipeline.writing.reshard.plan import plan_target
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.plan.division.placements import Placement, Replicate, Shard

TENSORS = {
    "rows": np.arange(96, dtype="u1").reshape(12, 8),
    "columns": np.arange(60, dtype="<i4").reshape(5, 12),
    "whole": np.arange(9, dtype="<i2"),
    "empty": np.zeros((0, 3), "u1"),
}
PLACEMENTS: dict[str, Placement] = {"rows": Shard(0), "columns": Shard(1)}


def piece(name: str, rank: int, world_size: int) -> np.ndarray[Any, Any]:
    """Cut a rank's piece with NumPy."""
    placement = PLACEMENTS.get(name)
    if not isinstance(placement, Shard):
        return TENSORS[name]
    return np.split(TENSORS[name], world_size, axis=placement.dim)[rank]


def rooms(nbytes: int, count: int = 2) -> list[BlockBuffers]:
    return [BlockBuffers(np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)) for _ in range(count)]


async def copy_to(folder: str, opened: Any, world_size: int, block_bytes: int) -> Copy:
    """Copy a source into the files of as many ranks."""
    source = opened.join()
    plan = plan_target(
        source,
        lambda name, shape: PLACEMENTS.get(name, Replicate()),
        world_size=world_size,
        max_shard_size=150,
        pattern=ShardPattern(),
        path="path",
    )
    names = [file.name for file in plan.files.files]
    target = Target(folder, None, overwrite=False)
    try:
        target.begin(names)
        headers = [plan.header(number) for number in range(len(names))]
        for name, header in zip(names, headers, strict=True):
            target.write(name, 0, [memoryview(header)], StopFlag())
        side = plan.side(np.array([len(header) for header in headers], np.int64))
        copy = Copy(opened.reader(source), source, target, side, plan.files, opened.threads)
        await copy.run(rooms(block_bytes))
        target.commit(names)
    finally:
        target.clean_up()
    return copy


@pytest.mark.parametrize("block_bytes", [16, 100, 4096])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 2), (3, 1)])
async def test_pieces_of_any_world_come_of_those_of_any_other(
    open_ranks: Any, placed: Any, folder: str, before: int, after: int, block_bytes: int
) -> None:
    ranks = [{name: piece(name, rank, before) for name in TENSORS} for rank in range(before)]
    opened = await open_ranks(*ranks, metadata=placed(**PLACEMENTS))
    copy = await copy_to(folder, opened, after, block_bytes)
    written = 0
    for rank in range(after):
        got: dict[str, np.ndarray[Any, Any]] = {}
        for path in Path(folder).glob(f"model-rank-{rank}-*.safetensors"):
            got |= load_file(path)
        assert got.keys() == TENSORS.keys()
        for name, tensor in got.items():
            np.testing.assert_array_equal(tensor, piece(name, rank, after), err_msg=name)
        written += sum(tensor.nbytes for tensor in got.values())
    assert copy.bytes_read == sum(tensor.nbytes for tensor in TENSORS.values())  # each byte once
    assert copy.bytes_written == written


async def test_a_read_that_fails_ends_the_copy_and_leaves_no_file(open_single: Any, folder: str) -> None:
    opened = await open_single(TENSORS)
    version, data = opened.store._files["model.safetensors"]
    opened.store._files["model.safetensors"] = (version, data[:-10])
    with pytest.raises(TruncatedError):
        await copy_to(folder, opened, 2, 64)
    assert not list(Path(folder).glob("*.safetensors"))
