import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import _core
from asyncshard.plan.division.chunks import ShardedTensor, chunk_bounds, validate_shard_shapes


def spec(**changes):
    return {"name": "w", "shape": (10, 3), "shard_dim": 0, "num_shards": 4, **changes}


@given(st.integers(0, 200), st.integers(1, 220))
def test_chunks_are_those_of_torch(size, num_chunks):
    rows = torch.arange(size)
    chunks = [chunk.tolist() for chunk in rows.chunk(num_chunks)] if size else []
    chunks += [[]] * (num_chunks - len(chunks))
    bounds = [chunk_bounds(size, num_chunks, index) for index in range(num_chunks)]
    assert [rows[start:stop].tolist() for start, stop in bounds] == chunks


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(st.just(tuple(shape)), st.integers(-len(shape), len(shape) - 1))
    ),
    st.integers(1, 12),
)
def test_local_shapes_are_those_of_torch_along_any_dimension(shape_and_dim, num_shards):
    shape, dim = shape_and_dim
    chunks = torch.empty(shape).chunk(num_shards, dim=dim)
    for index in range(num_shards):
        shard = ShardedTensor("w", shape, "F32", dim, num_shards, index)
        if index < len(chunks):
            assert shard.local_shape == tuple(chunks[index].shape)
        else:
            assert shard.local_shape[dim] == 0
        assert shard.local_stop - shard.local_start == shard.local_shape[dim]
        assert validate_shard_shapes([_as_spec(shard)], index, num_shards) == []
        other = list(shard.local_shape)
        other[dim] += 1
        assert len(validate_shard_shapes([{**_as_spec(shard), "local_shape": other}], index, num_shards)) == 1


def _as_spec(shard):
    fields = ("name", "shape", "dtype", "shard_dim", "num_shards", "local_shape")
    return {field: getattr(shard, field) for field in fields}


@pytest.mark.parametrize(("num_shards", "rows"), [(4, [3, 3, 3, 1]), (8, [2, 2, 2, 2, 2, 0, 0, 0])])
def test_an_uneven_dimension_loses_no_row(num_shards, rows):
    shards = [ShardedTensor("w", (10, 3), "BF16", 0, num_shards, index) for index in range(num_shards)]
    assert [shard.local_shape for shard in shards] == [(count, 3) for count in rows]


def test_shard_is_whole_by_default_and_counts_negative_dimensions_from_the_last():
    assert ShardedTensor("w", [4, 6], "F32").local_shape == (4, 6)
    shard = ShardedTensor("w", [4, 6], "F32", shard_dim=-1, num_shards=2, local_shard_index=1)
    assert (shard.shape, shard.shard_dim) == ((4, 6), 1)
    assert (shard.local_start, shard.local_stop, shard.local_shape) == (3, 6, (4, 3))
    assert shard == ShardedTensor("w", (4, 6), "F32", 1, 2, 1)
    assert hash(shard) == hash(ShardedTensor("w", (4, 6), "F32", 1, 2, 1))


def test_scalar_is_never_cut():
    for dim in (0, -1):
        scalar = ShardedTensor("s", (), "F32", dim)
        assert (scalar.local_shape, scalar.local_start, scalar.local_stop) == ((), 0, 1)
    with pytest.raises(ValueError, match="scalar has no dimension"):
        ShardedTensor("s", (), "F32", num_shards=2)
    with pytest.raises(ValueError, match="out of range"):
        ShardedTensor("s", (), "F32", shard_dim=1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shape": (4, -1)}, "shape[1] must be at least 0, got -1"),
        ({"shape": (4, 1.5)}, "shape[1] must be a whole number"),
        ({"shape": 4}, "sequence of whole numbers"),
        ({"shape": "44"}, "sequence of whole numbers"),
        ({"shard_dim": 2}, "shard_dim 2 is out of range for shape (4, 4)"),
        ({"shard_dim": -3}, "shard_dim -3 is out of range"),
        ({"shard_dim": None}, "shard_dim must be a whole number"),
        ({"num_shards": 0}, "num_shards must be at least 1"),
        ({"num_shards": True}, "num_shards must be a whole number"),
        ({"num_shards": 2, "local_shard_index": 2}, "local_shard_index 2 is not one of 2 shards"),
        ({"local_shard_index": -1}, "local_shard_index must be at least 0"),
    ],
)
def test_a_bad_shard_is_a_value_error_that_names_the_tensor(changes, complaint):
    with pytest.raises(ValueError) as caught:
        ShardedTensor(**{"name": "layer.w", "shape": (4, 4), "dtype": "F32", **changes})
    assert complaint in str(caught.value)
    assert "layer.w" in str(caught.value)


@pytest.mark.parametrize("arguments", [(-1, 1, 0), (1, 0, 0), (1, 1, 1), (1, 1, -1)])
def test_chunk_bounds_refuses_numbers_out_of_range(arguments):
    with pytest.raises(ValueError):
        chunk_bounds(*arguments)


def test_sharded_tensor_is_a_frozen_value():
    shard = ShardedTensor("w", (4,), "F32", 0, 2, 1)
    assert pickle.loads(pickle.dumps(shard)) == shard
    assert dataclasses.replace(shard, local_shard_index=0).local_stop == 2
    with pytest.raises(AttributeError):
        shard.shape = (5,)


def test_right_shapes_have_no_faults():
    specs = [
        spec(),
        spec(name="last", local_shape=(1, 3), dtype="BF16"),
        spec(name="columns", shard_dim=-1, local_shape=[10, 0]),
        spec(name="replicated", num_shards=1, local_shape=torch.Size([10, 3])),
        spec(name="scalar", shape=(), num_shards=1, local_shape=()),
        spec(name="numpy", shape=np.array([4, 2]), local_shape=np.array([1, 2]), shard_dim=np.int64(0)),
    ]
    assert validate_shard_shapes(specs, rank=3, world_size=4) == []
    assert validate_shard_shapes([], 0, 1) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_shards": 2}, "Spec 0 ('w'): num_shards is 2, must be 4 (world_size) or 1 (replicated)."),
        ({"num_shards": 0}, "Spec 0 ('w'): num_shards must be at least 1, got 0."),
        ({"shard_dim": 2}, "Spec 0 ('w'): shard_dim 2 is out of range for shape (10, 3)."),
        ({"shard_dim": -3}, "Spec 0 ('w'): shard_dim -3 is out of range for shape (10, 3)."),
        ({"shape": ()}, "Spec 0 ('w'): shard_dim 0 is out of range for shape ()."),
        (
            {"local_shape": (2, 3)},
            "Spec 0 ('w'): local_shape is (2, 3), must be (1, 3): shard 3 of 4 of shape (10, 3) along dimension 0.",
        ),
        (
            {"local_shape": (1,)},
            "Spec 0 ('w'): local_shape is (1,), must be (1, 3): shard 3 of 4 of shape (10, 3) along dimension 0.",
        ),
        (
            {"num_shards": 1, "local_shape": (1, 3)},
            "Spec 0 ('w'): local_shape is (1, 3), must be (10, 3): shard 0 of 1 of shape (10, 3) along dimension 0.",
        ),
        ({"local_shape": "x"}, "Spec 0 ('w'): local_shape must be a sequence of whole numbers, got 'x'."),
        ({"shape": (10, -3)}, "Spec 0 ('w'): shape[1] must be at least 0, got -3."),
        ({"shape": (2**63, 3)}, "Spec 0 ('w'): shape holds a size above 2**63 - 1."),
        ({"shape": None}, "Spec 0 ('w'): shape must be a sequence of whole numbers, got None."),
        ({"shard_dim": "0"}, "Spec 0 ('w'): shard_dim must be a whole number, got '0'."),
        ({"shard_dim": -(2**80)}, "Spec 0 ('w'): shard_dim is beyond 63 bits."),
        ({"dtype": ""}, "Spec 0 ('w'): dtype must be a name that is not empty, got ''."),
        ({"name": ""}, "Spec 0: name must be a text that is not empty, got ''."),
        ({"name": ["w"]}, "Spec 0: name must be a text that is not empty, got ['w']."),
    ],
)
def test_each_fault_is_one_sentence(changes, sentence):
    assert validate_shard_shapes([spec(**changes)], rank=3, world_size=4) == [sentence]


def test_missing_fields_duplicates_and_what_is_no_mapping_are_said():
    specs = [spec(), {"name": "w", "shape": (1,)}, {}, None, "w", spec(name="x", num_shards=3, shard_dim=5)]
    assert validate_shard_shapes(specs, 0, 4) == [
        "Spec 1 ('w'): the name is taken by spec 0.",
        "Spec 1 ('w'): shard_dim, num_shards missing.",
        "Spec 2: name, shape, shard_dim, num_shards missing.",
        "Spec 3 is a NoneType, not a mapping.",
        "Spec 4 is a str, not a mapping.",
        "Spec 5 ('x'): num_shards is 3, must be 4 (world_size) or 1 (replicated).",
        "Spec 5 ('x'): shard_dim 5 is out of range for shape (10, 3).",
    ]


@pytest.mark.parametrize(
    ("rank", "world_size", "sentence"),
    [
        (4, 4, "rank 4 is outside the world of 4 ranks, which count from 0."),
        (-1, 4, "rank must be at least 0, got -1."),
        ("0", 4, "rank must be a whole number, got '0'."),
        (0, 0, "world_size must be at least 1, got 0."),
        (0, 2**70, "world_size is beyond 63 bits."),
    ],
)
def test_a_faulty_world_is_one_sentence_and_hides_what_depends_on_it(rank, world_size, sentence):
    assert validate_shard_shapes([spec(local_shape=(9, 9))], rank, world_size)[0] == sentence
    assert validate_shard_shapes([spec()], rank, world_size) == [sentence]


def test_a_replicated_tensor_is_checked_without_a_rank():
    replicated = spec(num_shards=1, local_shape=(9, 3))
    assert len(validate_shard_shapes([replicated], 7, 4)) == 2


@given(
    st.lists(
        st.none()
        | st.dictionaries(
            st.sampled_from(["name", "shape", "shard_dim", "num_shards", "local_shape", "dtype"]),
            st.none() | st.integers() | st.text() | st.floats() | st.lists(st.integers(-1, 2**64)) | st.booleans(),
        )
    ),
    st.integers() | st.none() | st.text(),
    st.integers() | st.none() | st.text(),
)
def test_no_spec_raises(specs, rank, world_size):
    for sentence in validate_shard_shapes(specs, rank, world_size):
        assert sentence.endswith(".")


SIZES = st.integers(0, 20) | st.integers(2**62, 2**63 - 1)


@given(SIZES, st.integers(1, 30) | st.integers(2**61, 2**63 - 1), st.data())
def test_huge_sizes_and_worlds_do_not_overflow(size, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    start, stop = chunk_bounds(size, world_size, rank)
    one = spec(shape=(size,), num_shards=world_size, local_shape=(stop - start,))
    assert validate_shard_shapes([one], rank, world_size) == []


def test_kernel_refuses_shapes_outside_their_numbers():
    def check(dims=(1, 1), offset=0, ndim=1, local_offset=1, local_ndim=1, shards=(1,)):
        columns = [np.array([number]) for number in (offset, ndim, local_offset, local_ndim, 0)]
        _core.check_shard_shapes(np.array(dims), *columns, np.array(shards), 0, 1, np.zeros(1, np.uint8))

    check()
    for bad in (
        {"dims": (1, -1)},
        {"offset": -1},
        {"offset": 3},
        {"ndim": 3},
        {"ndim": -1},
        {"local_offset": 3},
        {"local_ndim": 2},
        {"local_ndim": -2},
        {"shards": (1, 1)},
    ):
        with pytest.raises(ValueError):
            check(**bad)
