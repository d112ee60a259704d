"""The bytes of a file that belong to a rank, against slicing the whole tensors. Also tests `planner`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import parse_header
from asyncshard.errors import CheckpointError
from asyncshard.format.digests import DIGESTS_KEY
from asyncshard.format.header import format_header
from asyncshard.plan.division.chunks import chunk_bounds
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.file_slices.planner import make_file_slice
from asyncshard.plan.tp.plan import TpPlan

WORLD = 4


def sliced(array, placement, rank, world_size=WORLD):
    """The rank's slice, by NumPy."""
    if isinstance(placement, Replicate):
        return array
    dim = placement.dim % array.ndim
    if isinstance(placement, Shard):
        pieces = placement.pieces or world_size
        start, stop = chunk_bounds(array.shape[dim], pieces, rank // (world_size // pieces))
        return np.take(array, range(start, stop), dim)
    blocks = np.split(array, np.cumsum(placement.sizes)[:-1], dim)
    return np.concatenate(
        [np.take(block, range(*chunk_bounds(block.shape[dim], world_size, rank)), dim) for block in blocks], dim
    )


@st.composite
def placed_arrays(draw):
    shape = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[dim]
    first = draw(st.integers(0, size))
    placement = draw(
        st.sampled_from(
            [Replicate(), Shard(dim), Shard(dim, 2), Shard(dim, 1), PackedShard(dim, (first, size - first))]
        )
    )
    dtype = draw(st.sampled_from(["u1", "<i2", "<f4", "<f8"]))
    return np.random.default_rng(draw(st.integers(0, 9))).integers(0, 200, shape).astype(dtype), placement


def part_of(data, placements, rank=0, wanted=None, world_size=WORLD, **options):
    header = parse_header(data)
    plan = None if placements is None else TpPlan(placements)
    return make_file_slice(header, plan, wanted, rank=rank, world_size=world_size, path="x", **options)


def read(data, part, start, stop):
    offsets, lengths = part.ranges(start, stop)
    assert (lengths > 0).all()
    assert (offsets[1:] > offsets[:-1] + lengths[:-1]).all()
    return b"".join(data[at : at + size] for at, size in zip(offsets.tolist(), lengths.tolist(), strict=True))


def test_what_a_filter_leaves_out_numbers_nothing_else(checkpoints):
    tensors = {name: np.zeros(shape, np.float32) for name, shape in (("a.0", (2, 4)), ("b", 4), ("a.1", (2, 4)))}
    data = checkpoints.shard(tensors)
    part = part_of(data, {"a.*": Shard(0)}, wanted=lambda name: name != "a.0")
    alone = part_of(checkpoints.shard({"x": tensors["b"], "y": tensors["a.1"]}), {"y": Shard(0)})
    assert part.kinds.tolist() == alone.kinds.tolist() == [0, 1]
    with pytest.raises(CheckpointError, match="'b'"):
        part_of(data, {"a.*": Shard(3), "b": Shard(3)}, wanted=lambda name: name != "a.0")


@given(st.lists(placed_arrays(), max_size=8), st.integers(0, WORLD - 1), st.booleans(), st.data())
def test_the_ranges_of_any_bytes_of_a_part_are_those_of_the_sliced_tensors(checkpoints, placed, rank, skips, draw):
    tensors = {f"t{number}": array for number, (array, _) in enumerate(placed)}
    placements = {f"t{number}": placement for number, (_, placement) in enumerate(placed)}
    data = checkpoints.shard(tensors, metadata={"a": "b"})
    wanted = (lambda name: name not in ("t0", "t3")) if skips else None
    part = part_of(data, placements, rank, wanted)
    local = {
        name: sliced(array, placements[name], rank) for name, array in tensors.items() if wanted is None or wanted(name)
    }
    if part is None:
        assert checkpoints.same({k: np.ascontiguousarray(v) for k, v in local.items()}, tensors)
        return
    size = part.header.size
    expected = bytes(size) + b"".join(np.ascontiguousarray(array).tobytes() for array in local.values())
    assert part.header.file_size == len(expected)
    assert part.bytes_needed == len(expected) - size
    assert [(info.name, info.shape) for info in part.header.values()] == [(n, a.shape) for n, a in local.items()]
    assert part.header.metadata == {"a": "b"}
    for info in part.header.values():
        assert read(data, part, info.start, info.stop) == expected[info.start : info.stop]
    start = draw.draw(st.integers(size, len(expected)))
    stop = draw.draw(st.integers(start, len(expected)))
    assert read(data, part, start, stop) == expected[start:stop]
    batches = list(part.batches(start, stop, draw.draw(st.integers(1, 20))))
    assert b"".join(read(data, part, *batch) for batch in batches) == expected[start:stop]
    offsets, lengths = part.ranges(size, len(expected))
    assert len(offsets) <= max(part.count(size, len(expected)), 0)
    for max_gap in (0, 1, 5, 50, 10**6):
        gaps = offsets[1:] - offsets[:-1] - lengths[:-1]
        assert part.bytes_read(max_gap) == part.bytes_needed + gaps[gaps <= max_gap].sum()


def test_batches_hold_few_ranges(checkpoints):
    data = checkpoints.shard({"a": np.zeros((1000, 8), "u1"), "b": np.zeros((500, 4), "u1")})
    part = part_of(data, {"a": Shard(1), "b": Shard(1)})
    batches = list(part.batches(part.header.size, part.header.file_size, 100))
    assert len(batches) == 15
    assert max(len(part.ranges(*batch).offsets) for batch in batches) == 100
    assert batches[0][0] == part.header.size
    assert batches[-1][1] == part.header.file_size


def test_a_file_that_is_wanted_whole_is_no_part(checkpoints):
    data = checkpoints.shard({"a": np.zeros((4, 4))})
    assert part_of(data, {"a": Replicate()}) is None
    assert part_of(data, {"a": Shard(0)}, world_size=1) is None
    assert part_of(data, None, wanted=lambda name: True) is None


def test_digests_are_those_of_whole_tensors_or_none(checkpoints):
    digests = "".join(f"{number:032x}" for number in range(3))
    tensors = {name: np.arange(8) for name in "abc"}
    data = checkpoints.shard(tensors, metadata={DIGESTS_KEY: digests, "format": "pt"})
    cut = part_of(data, {"a": Shard(0), "b": Replicate(), "c": Replicate()})
    assert cut.header.metadata == {"format": "pt"}
    kept = part_of(data, None, wanted=lambda name: name != "b")
    assert kept.header.metadata == {"format": "pt", DIGESTS_KEY: f"{0:032x}{2:032x}"}
    data = checkpoints.shard(tensors, metadata={DIGESTS_KEY: "short"})
    assert part_of(data, None, wanted=lambda name: name != "b").header.metadata == {DIGESTS_KEY: "short"}


def test_a_part_is_told_from_other_ranks_and_other_placements(checkpoints):
    data = checkpoints.shard({"a": np.zeros((8, 8)), "b": np.zeros((8, 8))})
    found = [part_of(data, {"a": Shard(0), "b": Shard(1)}, rank).digest for rank in range(WORLD)]
    found.append(part_of(data, {"a": Shard(1), "b": Shard(0)}).digest)
    found.append(part_of(data, {"a": Shard(0), "b": Replicate()}).digest)
    assert len(set(found)) == len(found)
    assert part_of(data, {"a": Shard(0), "b": Shard(1)}).digest == found[0]


def test_a_tensor_that_cannot_be_cut_names_file_and_tensor(checkpoints):
    data = checkpoints.shard({"a": np.zeros(8)})
    with pytest.raises(CheckpointError, match=r"^x: tensor 'a' of shape \(8,\)") as caught:
        part_of(data, {"a": Shard(3)})
    assert (caught.value.path, caught.value.tensor) == ("x", "a")


def test_a_large_header_is_planned_with_few_objects_and_lets_others_run(checkpoints):
    count = 100_000
    text = format_header((f"layers.{number}.weight", "F32", (64, 64), 64 * 64 * 4) for number in range(count))
    header = parse_header(text, len(text) + count * 64 * 64 * 4)
    seen = []

    def yielding_gil(numbers):
        seen.append(len(numbers))
        return iter(numbers)

    part = make_file_slice(
        header,
        TpPlan({name: Shard(0) for name in header}),
        None,
        rank=3,
        world_size=64,
        path="x",
        yielding_gil=yielding_gil,
    )
    assert seen == [count]
    assert part.bytes_needed == part.bytes_read(0) == count * 64 * 4
    assert len(part.ranges(part.header.size, part.header.file_size).offsets) == count
