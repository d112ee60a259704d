"""The pieces of ranks are joined to whole tensors, or what keeps them apart is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from asyncshard.errors import CheckpointError
from asyncshard.pipeline.writing.reshard.divider import Divider
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.text import Problems
from asyncshard.plan.tp.plan import TpPlan


@pytest.fixture
def make_divider(open_ranks: Any) -> Any:
    """Make the divider of ranks that hold these tensors, in one order."""

    async def make(*ranks: Any, written: Any = None, place: Any = None) -> tuple[Divider, Problems]:
        shards = [shard for checkpoint in (await open_ranks(*ranks)).checkpoints for shard in checkpoint.shards]
        count = len(ranks[0])
        files = np.repeat(np.arange(len(ranks))[:, None], count, axis=1)
        rows = np.repeat(np.arange(count)[None], len(ranks), axis=0)
        faults = Problems("path")
        return Divider(shards, files, rows, written, place, faults), faults

    return make


def arrays(dtype: str = "u1", **shapes: tuple[int, ...]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: np.zeros(shape, dtype) for name, shape in shapes.items()}


async def test_pieces_are_joined_along_the_dimension_that_was_written(make_divider: Any) -> None:
    divider, faults = await make_divider(arrays(a=(2, 3)), arrays(a=(1, 3)), written={"a": Shard(0)})
    assert divider.find(0, "a") == 0
    assert (divider.shapes, divider.placements) == ([(3, 3)], [Shard(0)])
    assert [piece.nbytes for piece in divider.divisions[0].slices] == [6, 3]
    faults.require_none()


async def test_a_tensor_without_a_written_placement_is_whole_on_every_rank(make_divider: Any) -> None:
    divider, faults = await make_divider(arrays(a=(2, 3)), arrays(a=(2, 3)), written={})
    divider.find(0, "a")
    assert (divider.shapes, divider.placements) == ([(2, 3)], [Replicate()])
    assert divider.divisions[0].first_ranks == {0}
    faults.require_none()


async def test_tensors_that_are_alike_share_a_division(make_divider: Any) -> None:
    tensors = {**arrays(a=(2, 3), b=(2, 3), c=(3, 2)), **arrays("<i2", d=(2, 3))}
    divider, _ = await make_divider(tensors, tensors, written=dict.fromkeys("abcd", Shard(0)))
    assert [divider.find(index, name) for index, name in enumerate("abcd")] == [0, 0, 1, 2]
    assert divider.shapes == [(4, 3), (6, 2), (4, 3)]


async def test_a_plan_places_what_the_files_do_not(make_divider: Any) -> None:
    plan = TpPlan({"o": "rowwise"})
    divider, faults = await make_divider(
        arrays(**{"o.weight": (4, 2)}), arrays(**{"o.weight": (4, 2)}), place=plan.placement_of
    )
    divider.find(0, "o.weight")
    assert divider.shapes == [(4, 4)]
    faults.require_none()


async def test_the_sizes_of_packed_tensors_are_those_of_the_joined_shape(make_divider: Any) -> None:
    plan = TpPlan({"gate_up": "packed_colwise"})
    tensors = arrays(**{"gate_up.weight": (4, 3)})
    divider, faults = await make_divider(tensors, tensors, place=plan.placement_of)
    divider.find(0, "gate_up.weight")
    (placement,) = divider.placements
    assert isinstance(placement, PackedShard)
    assert (divider.shapes, placement.sizes) == ([(8, 3)], (4, 4))
    # A rank's rows come from each of the two tensors.
    assert divider.divisions[0].slices[1].runs == ((6, 6), (18, 6))
    faults.require_none()


@pytest.mark.parametrize(
    ("ranks", "placement", "fault"),
    [
        (
            (arrays(a=(2, 3)), arrays("<i2", a=(2, 3))),
            Shard(0),
            "the ranks disagree on the dtype of tensor 'a': U8 on rank 0, I16 on rank 1",
        ),
        (
            (arrays(a=(1, 3)), arrays(a=(2, 3))),
            Shard(0),
            r"rank 0: tensor 'a' has shape \(1, 3\), must be \(2, 3\): its piece of \(3, 3\)",
        ),
        ((arrays(a=(2,)), arrays(a=(2,))), Shard(1), "tensor 'a' has the shapes .* no dimension 1"),
        ((arrays(a=(2,)),) * 3, Shard(0, pieces=2), "tensor 'a' cannot be joined by Shard.*2 pieces"),
    ],
    ids=["dtype", "shape", "dimension", "pieces"],
)
async def test_what_does_not_add_up_is_a_fault_that_names_the_tensor(
    make_divider: Any, ranks: Any, placement: Shard, fault: str
) -> None:
    divider, faults = await make_divider(*ranks, written={"a": placement})
    assert divider.find(0, "a") == -1
    with pytest.raises(CheckpointError, match=fault):
        faults.require_none()
