"""Blocks are read into memory from whichever ranks have their bytes, and their memory is within the budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncshard.errors import BudgetError
from asyncshard.pipeline.writing.reshard.block_reader import local_offsets, take_block_buffers, views_of
from asyncshard.plan.division.blocks import Extent, RankRuns, cut_blocks
from asyncshard.plan.division.placements import Shard

A = np.arange(48, dtype="u1").reshape(6, 8)
B = np.arange(10, dtype="<i2")
RUNS = RankRuns([Extent(0, 100, 0, 2), Extent(1, 7, 2, 3)], np.array([0, 6, 3]), np.array([2, 1, 3]), 6)


@pytest.mark.parametrize("is_staged", [True, False])
@pytest.mark.parametrize("limit", [7, 20, 1000])
async def test_blocks_hold_the_whole_tensors_one_after_the_other(
    open_ranks: Any, placed: Any, is_staged: bool, limit: int
) -> None:
    ranks = [{"a": A[:, 4 * rank : 4 * rank + 4], "b": B} for rank in (0, 1)]
    opened = await open_ranks(*ranks, metadata=placed(a=Shard(1)))
    source = opened.join()
    reader, side = opened.reader(source), source.side
    data = b""
    for block in cut_blocks(source.sizes, side.most_runs(), limit):
        memory, staging = np.zeros(block.nbytes, np.uint8), np.zeros(block.nbytes, np.uint8)
        runs = [side.rank_runs(block, source.sizes, rank, is_read=True) for rank in (0, 1)]
        await reader.read([each for each in runs if each.nbytes], memory, staging if is_staged else None)
        data += memory.tobytes()
    assert data == A.tobytes() + B.tobytes()


def test_runs_lie_one_after_the_other_where_they_are_gathered() -> None:
    assert local_offsets(RUNS).tolist() == [0, 2, 3]
    gathered = np.frombuffer(b"abcdef", np.uint8)
    views = views_of(RUNS, np.zeros(7, np.uint8), gathered)
    assert [(extent.start, [bytes(view) for view in each]) for extent, each in views] == [
        (100, [b"abc"]),
        (7, [b"def"]),
    ]


def test_runs_in_place_are_views_of_the_block() -> None:
    views = views_of(RUNS, np.frombuffer(b"0123456", np.uint8), None)
    assert [[bytes(view) for view in each] for _, each in views] == [[b"01", b"6"], [b"345"]]


async def test_memory_is_for_several_blocks_of_whole_pages_within_the_budget(account: Any) -> None:
    account.charge_headers(100_000, "path")
    buffers = await take_block_buffers(account, 10_000)
    assert len(buffers) > 1
    assert {len(memory) for room in buffers for memory in room} == {8192}
    assert account.committed <= account.budget.nbytes


async def test_blocks_shrink_where_the_budget_is_nearly_full(account: Any) -> None:
    account.charge_headers(account.budget.nbytes - 5 * 4096, "path")
    buffers = await take_block_buffers(account, 1 << 20)
    assert [len(room.memory) for room in buffers] == [4096, 4096]
    assert account.committed <= account.budget.nbytes


async def test_a_budget_without_room_for_a_page_is_refused(account: Any) -> None:
    account.charge_headers(account.budget.nbytes - 4096, "path")
    with pytest.raises(BudgetError, match=r"has no room to copy anything beside .* raise memory_budget_mb") as caught:
        await take_block_buffers(account, 1 << 20)
    assert caught.value.needed_bytes == account.header_bytes + 2 * 4096
