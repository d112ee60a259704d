"""What several ranks hold alike is compared, by digests where the files have them, else byte by byte."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from asyncshard.errors import CheckpointError
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.pipeline.writing.reshard.block_reader import BlockBuffers
from asyncshard.pipeline.writing.reshard.replicas import Comparison, Copies, compare_digests
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.text import Problems

WHOLE, PART = np.arange(50, dtype="u1"), np.arange(6, dtype="u1")
SAME = {"whole": WHOLE, "part": PART, "more": WHOLE + 1}


def digests(tensors: Any) -> dict[str, str]:
    """Return metadata with a digest of each tensor; which hash it is does not matter to who compares them."""
    return {DIGESTS_KEY: "".join(hashlib.md5(tensor.tobytes()).hexdigest() for tensor in tensors.values())}


async def compare(opened: Any, block_bytes: int = 4096) -> tuple[int, Problems]:
    """Compare all copies as a reshard does; return the bytes that were read for it, and the faults."""
    faults = Problems("path")
    source = opened.join()
    comparison = Comparison(opened.reader(source), opened.threads, faults)
    rooms = [BlockBuffers(np.zeros(block_bytes, np.uint8), np.zeros(block_bytes, np.uint8)) for _ in range(2)]
    for copies in compare_digests(source, faults):
        await comparison.run(copies, rooms)
    return comparison.bytes_compared, faults


@pytest.mark.parametrize("block_bytes", [32, 60, 4096])
async def test_copies_without_digests_are_read_and_compared(open_ranks: Any, placed: Any, block_bytes: int) -> None:
    other = {**SAME, "part": PART + 6}
    nbytes, faults = await compare(await open_ranks(SAME, other, metadata=placed(part=Shard(0))), block_bytes)
    assert nbytes == 2 * 100  # of the two tensors that both ranks have
    faults.require_none()


@pytest.mark.parametrize("block_bytes", [32, 60, 4096])
@pytest.mark.parametrize("at", [0, 31, 49])
async def test_a_copy_that_differs_in_one_byte_is_named_with_its_ranks(
    open_ranks: Any, placed: Any, block_bytes: int, at: int
) -> None:
    changed = WHOLE.copy()
    changed[at] += 1
    ranks = (SAME, SAME, {**SAME, "whole": changed})
    _, faults = await compare(await open_ranks(*ranks, metadata=placed()), block_bytes)
    with pytest.raises(CheckpointError, match="rank 0 and rank 2 hold other bytes of tensor 'whole'") as caught:
        faults.require_none()
    assert "'more'" not in str(caught.value)
    assert "rank 1" not in str(caught.value)


async def test_equal_digests_spare_the_reading(open_ranks: Any, placed: Any) -> None:
    nbytes, faults = await compare(await open_ranks(SAME, SAME, metadata={**placed(), **digests(SAME)}))
    assert nbytes == 0
    faults.require_none()


async def test_digests_that_differ_are_a_fault_without_reading(open_ranks: Any, placed: Any) -> None:
    other = {**SAME, "whole": WHOLE[::-1]}
    metadata = [{**placed(), **digests(each)} for each in (SAME, other)]
    nbytes, faults = await compare(await open_ranks(SAME, other, metadata=metadata))
    assert nbytes == 0
    with pytest.raises(CheckpointError, match="rank 0 and rank 1 hold other bytes of tensor 'whole'"):
        faults.require_none()


async def test_a_file_without_digests_has_its_copies_read(open_ranks: Any, placed: Any) -> None:
    nbytes, _ = await compare(await open_ranks(SAME, SAME, metadata=[{**placed(), **digests(SAME)}, placed()]))
    assert nbytes == 2 * 106


async def test_a_copy_is_one_of_the_first_rank_that_has_the_same_piece(open_ranks: Any, placed: Any) -> None:
    ranks = [{"part": PART + 6 * (rank // 2)} for rank in range(4)]
    source = (await open_ranks(*ranks, metadata=placed(part=Shard(0, pieces=2)))).join()
    assert [Copies(source, rank).first_ranks.tolist() for rank in range(1, 4)] == [[0], [], [2]]
