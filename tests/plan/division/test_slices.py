"""Slices of tensors, against torch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import Shard as TorchShard

from asyncshard.errors import CheckpointError
from asyncshard.format.dtypes import DTYPES
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.division.slices import slice_tensor

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
WHOLE_BYTES = st.sampled_from([dtype.bits for dtype in DTYPES if dtype.bits % 8 == 0])
PARTS_OF_BYTES = st.sampled_from([4, 6])


@st.composite
def worlds(draw):
    """Draw a number of ranks, and into how many pieces they cut a tensor."""
    pieces = draw(st.integers(1, 8))
    return pieces * draw(st.integers(1, 3)), pieces


@st.composite
def packed(draw):
    """Draw a shape, one of its dimensions, and the sizes of the tensors fused along it."""
    sizes = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)))
    shape = list(draw(SHAPES))
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = sum(sizes)
    return tuple(shape), dim, sizes


def tensor_of(shape):
    return torch.arange(int(np.prod(shape)), dtype=torch.int64).reshape(shape)


def chunk_of(tensor, dim, pieces, index):
    """Return a chunk by torch, empty past the last."""
    chunks = torch.chunk(tensor, pieces, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def bytes_of(tensor, bits):
    """Return a tensor as a file holds it, with elements of `bits` bits that are cut from their numbers."""
    numbers = tensor.numpy().reshape(-1)
    if bits % 8:
        flags = (numbers[:, None] >> np.arange(bits)) & 1
        return np.packbits(flags.astype(np.uint8), axis=None, bitorder="little").tobytes()
    return np.stack([(numbers * 37 + place) % 251 for place in range(bits // 8)], axis=-1).astype(np.uint8).tobytes()


def read(part, data):
    """Read the rank's tensor out of the bytes of the whole one."""
    result = b""
    for whole, local, length in zip(*(array.tolist() for array in part.within_whole(0, len(data))), strict=True):
        assert local == len(result)
        assert length > 0
        assert 0 <= whole <= whole + length <= len(data)
        result += data[whole : whole + length]
    return result


def places(part):
    """Return for each byte of the rank's tensor its offset in the whole one."""
    return [
        row * part.stride + offset + step
        for row in range(part.outer)
        for offset, length in part.runs
        for step in range(length)
    ]


@given(SHAPES, WHOLE_BYTES, worlds(), st.data())
def test_every_rank_has_torchs_chunk(shape, bits, world, data):
    world_size, pieces = world
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = tensor_of(shape)
    placement = Shard(dim) if pieces == world_size else Shard(dim, pieces)
    for rank in range(world_size):
        part = slice_tensor("w", shape, bits, placement, rank=rank, world_size=world_size)
        expected = chunk_of(tensor, dim, pieces, rank // (world_size // pieces))
        assert part.shape == tuple(expected.shape)
        assert part.nbytes == expected.numel() * bits // 8
        assert read(part, bytes_of(tensor, bits)) == bytes_of(expected, bits)


@given(SHAPES, st.integers(1, 12), st.data())
def test_sizes_follow_the_rule_of_dtensor(shape, world_size, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    for rank in range(world_size):
        part = slice_tensor("w", shape, 16, Shard(dim), rank=rank, world_size=world_size)
        size, _ = TorchShard.local_shard_size_and_offset(shape[dim], world_size, rank)
        assert part.shape == (*shape[:dim], size, *shape[dim + 1 :])


@given(packed(), WHOLE_BYTES, st.integers(1, 6))
def test_each_of_the_fused_tensors_is_cut_by_itself(fused, bits, world_size):
    shape, dim, sizes = fused
    tensor = tensor_of(shape)
    for rank in range(world_size):
        part = slice_tensor("w", shape, bits, PackedShard(dim, sizes), rank=rank, world_size=world_size)
        pieces = [chunk_of(one, dim, world_size, rank) for one in torch.split(tensor, sizes, dim)]
        expected = torch.cat(pieces, dim)
        assert part.shape == tuple(expected.shape)
        assert read(part, bytes_of(tensor, bits)) == bytes_of(expected, bits)


@given(SHAPES, PARTS_OF_BYTES, worlds(), st.data())
def test_elements_smaller_than_a_byte_are_cut_at_bytes_or_by_no_rank(shape, bits, world, data):
    world_size, pieces = world
    shape = (*shape[:-1], shape[-1] * 8 // data.draw(st.sampled_from([1, 2, 4, 8])))
    if int(np.prod(shape)) * bits % 8:
        return  # no file holds it
    dim = data.draw(st.integers(0, len(shape) - 1))
    tensor = tensor_of(shape)
    parts, errors = [], set()
    for rank in range(world_size):
        try:
            parts.append(slice_tensor("w", shape, bits, Shard(dim, pieces), rank=rank, world_size=world_size))
        except CheckpointError as error:
            errors.add(str(error))
    assert len(errors) <= 1
    assert not (errors and parts)
    expected = [chunk_of(tensor, dim, pieces, rank // (world_size // pieces)) for rank in range(world_size)]
    rows = int(np.prod(shape[:dim]))
    is_on_bytes = pieces == 1 or all(part.numel() // max(rows, 1) * bits % 8 == 0 for part in expected)
    assert bool(errors) == (not is_on_bytes)
    for part, chunk in zip(parts, expected, strict=False):
        assert part.shape == tuple(chunk.shape)
        assert read(part, bytes_of(tensor, bits)) == bytes_of(chunk, bits)


@given(packed(), PARTS_OF_BYTES, st.integers(1, 4))
def test_fused_elements_smaller_than_a_byte_are_cut_by_every_rank_or_by_none(fused, bits, world_size):
    shape, dim, sizes = fused
    if int(np.prod(shape)) * bits % 8:
        return
    tensor = tensor_of(shape)
    parts, errors = [], set()
    for rank in range(world_size):
        try:
            parts.append(slice_tensor("w", shape, bits, PackedShard(dim, sizes), rank=rank, world_size=world_size))
        except CheckpointError as error:
            errors.add(str(error))
    assert len(errors) <= 1
    assert not (errors and parts)
    for rank, part in enumerate(parts):
        pieces = [chunk_of(one, dim, world_size, rank) for one in torch.split(tensor, sizes, dim)]
        expected = torch.cat(pieces, dim)
        assert read(part, bytes_of(tensor, bits)) == bytes_of(expected, bits)


PLACED = st.one_of(
    packed().map(lambda fused: (fused[0], PackedShard(fused[1], fused[2]))),
    SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.integers(0, len(shape) - 1).map(Shard))),
    SHAPES.map(lambda shape: (shape, Replicate())),
)


@given(PLACED, WHOLE_BYTES, st.integers(1, 5), st.data())
def test_a_range_of_the_whole_tensor_gives_the_runs_of_the_rank_within_it(placed, bits, world_size, data):
    shape, placement = placed
    rank = data.draw(st.integers(0, world_size - 1))
    part = slice_tensor("w", shape, bits, placement, rank=rank, world_size=world_size)
    nbytes = int(np.prod(shape)) * bits // 8
    start, stop = sorted(data.draw(st.tuples(st.integers(0, nbytes), st.integers(0, nbytes))))
    found = part.within_whole(start, stop)
    pairs = [
        (whole + step, local + step)
        for whole, local, length in zip(*(array.tolist() for array in found), strict=True)
        for step in range(length)
    ]
    assert pairs == [(whole, local) for local, whole in enumerate(places(part)) if start <= whole < stop]
    positions = [local for _, local in pairs]
    assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True


def test_a_rank_that_has_the_whole_tensor_has_it_in_one_run():
    for placement in (Shard(1), PackedShard(1, (1, 0))):
        part = slice_tensor("w", (1000, 1), 16, placement, rank=0, world_size=2)
        assert (part.outer, part.runs) == (1, ((0, 2000),))
    assert slice_tensor("w", (4, 6), 16, PackedShard(1, (2, 4)), rank=0, world_size=1).runs == ((0, 48),)


def test_along_the_first_dimension_a_piece_is_one_range():
    part = slice_tensor("w", (10, 3), 32, Shard(0), rank=3, world_size=4)
    assert part == ((1, 3), 1, 120, ((108, 12),))
    overlap = part.within_whole(112, 117)
    assert [array.tolist() for array in overlap] == [[112], [4], [5]]


@pytest.mark.parametrize(
    ("shape", "bits", "placement", "world_size", "words"),
    [
        ((4,), 16, Shard(1), 2, "no such dimension"),
        ((4, 4), 16, Shard(-3), 2, "no such dimension"),
        ((), 16, Shard(0), 2, "no such dimension"),
        ((4, 4), 16, PackedShard(0, (2, 3)), 2, "add up to 5, not 4"),
        ((4, 4), 16, PackedShard(0, (2, 1)), 1, "add up to 3, not 4"),
        ((4, 4), 16, Shard(0, 3), 4, "no multiple of 3 pieces"),
        ((4, 4), 16, Shard(0, 8), 4, "no multiple of 8 pieces"),
        ((2, 6), 4, Shard(1), 2, "within a byte"),
        ((2, 4), 6, Shard(1), 4, "within a byte"),
    ],
)
def test_a_tensor_that_cannot_be_cut_is_refused_alike_on_all_ranks(shape, bits, placement, world_size, words):
    messages = set()
    for rank in range(world_size):
        with pytest.raises(CheckpointError, match=words) as caught:
            slice_tensor("layers.0.w", shape, bits, placement, rank=rank, world_size=world_size)
        assert caught.value.tensor == "layers.0.w"
        assert "'layers.0.w'" in str(caught.value)
        messages.add(str(caught.value))
    assert len(messages) == 1
