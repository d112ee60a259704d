"""The ranks of a source are opened, and their tensors matched by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncshard.errors import CheckpointError
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.format.save_id import SAVE_KEY
from asyncshard.pipeline.writing.reshard.source import Source
from asyncshard.plan.division.placements import Replicate, Shard

A, B = np.arange(6, dtype="u1").reshape(2, 3), np.arange(4, dtype="<i2")


def bytes_of(source: Source, store: Any, rank: int, tensor: int) -> bytes:
    """Return the bytes of a rank's piece of a tensor, by what the source says of its place."""
    shard = source.shards[source.side.files[rank, tensor]]
    start = int(source.side.starts[rank, tensor])
    piece = source.side.divisions[source.side.division_of[tensor]].slices[rank]
    data: bytes = store._files[shard.meta.name][1]
    return data[start : start + piece.nbytes]


async def test_tensors_come_in_the_order_of_the_first_rank_and_are_found_wherever_the_others_have_them(
    checkpoints: Any, open_files: Any, placed: Any
) -> None:
    metadata = placed(a=Shard(0))
    files = {
        "model-rank-0-part-0.safetensors": checkpoints.shard({"a": A, "b": B}, metadata=metadata),
        "model-rank-1-part-0.safetensors": checkpoints.shard({"b": B}, metadata=metadata),
        "model-rank-1-part-1.safetensors": checkpoints.shard({"a": A + 6}, metadata=metadata),
    }
    opened = await open_files(files)
    source = opened.join()
    assert [source.tensors.name(index) for index in (0, 1)] == ["a", "b"]
    assert (source.placements, source.shapes) == ((Shard(0), Replicate()), ((4, 3), (4,)))
    assert source.sizes.tolist() == [12, 8]
    pieces = [bytes_of(source, opened.store, rank, tensor) for tensor in (0, 1) for rank in (0, 1)]
    assert pieces == [A.tobytes(), (A + 6).tobytes(), B.tobytes(), B.tobytes()]


async def test_a_hugging_face_checkpoint_is_one_rank_that_has_all(checkpoints: Any, open_files: Any) -> None:
    opened = await open_files({"model.safetensors": checkpoints.shard({"a": A, "b": B})})
    source = opened.join()
    assert (source.is_ranks, source.side.world_size) == (False, 1)
    assert set(source.placements) == {Replicate()}
    assert [bytes_of(source, opened.store, 0, tensor) for tensor in (0, 1)] == [A.tobytes(), B.tobytes()]


async def test_an_empty_checkpoint_is_a_source_of_no_tensors(open_single: Any) -> None:
    source = (await open_single({})).join()
    assert (len(source.tensors.rows), source.sizes.tolist()) == (0, [])


async def test_metadata_are_merged_without_our_own_and_the_first_file_wins(open_ranks: Any, placed: Any) -> None:
    first = {**placed(), "format": "pt", "x": "1", SAVE_KEY: "one"}
    second = {**placed(), "x": "2", "y": "3", DIGESTS_KEY: "0" * 32, SAVE_KEY: "two"}
    source = (await open_ranks({"a": A}, {"a": A}, metadata=[first, second])).join()
    assert source.metadata == {"format": "pt", "x": "1", "y": "3"}


async def test_tensors_that_a_rank_lacks_are_all_named(open_ranks: Any, placed: Any) -> None:
    opened = await open_ranks({"a": A, "b": B}, {"b": B, "c": B}, metadata=placed())
    with pytest.raises(CheckpointError) as caught:
        opened.join()
    assert "rank 1 lacks tensor 'a', which rank 0 has" in str(caught.value)
    assert "rank 0 lacks tensor 'c', which rank 1 has" in str(caught.value)
    assert "tensor 'b'" not in str(caught.value)


async def test_ranks_that_do_not_say_how_they_are_divided_need_a_plan(open_ranks: Any) -> None:
    opened = await open_ranks({"a": A}, {"a": A})
    with pytest.raises(CheckpointError, match="pass the tp_plan that they were written with"):
        opened.join()
    assert opened.join(lambda name, shape: Shard(1)).shapes == ((2, 6),)


async def test_a_rank_that_is_missing_is_named(checkpoints: Any, open_files: Any) -> None:
    files = {f"model-rank-{rank}-part-0.safetensors": checkpoints.shard({"a": A}) for rank in (0, 2)}
    with pytest.raises(CheckpointError, match="rank 1"):
        await open_files(files)


async def test_pipeline_stages_are_not_joined(checkpoints: Any, open_files: Any) -> None:
    files = {f"model-pp-{stage}-tp-0-part-0.safetensors": checkpoints.shard({f"a{stage}": A}) for stage in (0, 1)}
    with pytest.raises(CheckpointError, match="it has pipeline stages: reshard each of them by itself"):
        await open_files(files)


async def test_files_that_are_no_safetensors_are_all_named(checkpoints: Any, open_files: Any) -> None:
    files = {f"model-rank-{rank}-part-0.safetensors": checkpoints.shard({"a": A}) for rank in range(3)}
    files |= dict.fromkeys(list(files)[1:], b"nothing")
    with pytest.raises(CheckpointError) as caught:
        await open_files(files)
    assert ["rank-1" in str(caught.value), "rank-2" in str(caught.value)] == [True, True]
