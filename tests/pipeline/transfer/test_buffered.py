"""What a plain stream delivers: every type and shape, aligned, in whatever way the file lays them out."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import AsyncShardLoader
from asyncshard.errors import UnsupportedTensorError
from asyncshard.format.dtypes import DTYPES, by_name
from asyncshard.testing import MemoryStore

MIB = 1 << 20


async def load(data, **tuning):
    loader = AsyncShardLoader(**{"memory_budget_mb": 4, **tuning})
    async with loader.stream(MemoryStore({"model.safetensors": data})) as stream:
        return {name: tensor async for name, tensor in stream}


def is_aligned(tensor):
    return tensor.__array_interface__["data"][0] % tensor.dtype.itemsize == 0


@pytest.mark.parametrize("padding", range(8))
async def test_every_dtype_is_delivered_aligned_wherever_the_data_begins(checkpoints, padding):
    tensors = checkpoints.every_dtype(elements=24)
    got = await load(checkpoints.shard(tensors, padding=padding))
    assert checkpoints.same(got, tensors)
    for name, tensor in got.items():
        dtype = by_name[name]
        assert is_aligned(tensor)
        assert tensor.dtype == (np.uint8 if dtype.numpy is None else dtype.numpy)
        assert tensor.shape == ((24 * dtype.bits // 8,) if dtype.numpy is None else (24,))
        assert tensor.flags.writeable


LAYOUTS = st.lists(
    st.tuples(
        st.sampled_from([dtype.name for dtype in DTYPES]), st.lists(st.integers(0, 5), max_size=4), st.integers(1, 40)
    ),
    max_size=12,
)


@given(layout=LAYOUTS, padding=st.integers(0, 9), chunk_size=st.sampled_from([64, 200, 1 << 20]))
async def test_tensors_of_any_shape_in_any_mixture_come_out_whole(checkpoints, layout, padding, chunk_size):
    tensors = {}
    for number, (name, shape, seed) in enumerate(layout):
        if by_name[name].bits < 8:
            shape = [*shape, 4]
        nbytes = int(np.prod(shape, dtype=int)) * by_name[name].bits // 8
        data = np.random.default_rng(seed).integers(0, 2 if name == "BOOL" else 256, nbytes, np.uint8).tobytes()
        tensors[f"{number}"] = checkpoints.Raw(name, tuple(shape), data)
    got = await load(checkpoints.shard(tensors, padding=padding), chunk_size=chunk_size)
    # Empty tensors stand where their offset puts them, before the one that begins there.
    assert checkpoints.same(dict(sorted(got.items(), key=lambda item: int(item[0]))), tensors)
    for name, tensor in got.items():
        assert is_aligned(tensor)
        if by_name[tensors[name].dtype].numpy is not None:
            assert tensor.shape == tensors[name].shape


async def test_misaligned_tensors_of_several_pages_are_moved_apart_whole(checkpoints):
    tensors = {}
    for number in range(20):
        tensors[f"odd.{number}"] = np.arange(3 + number, dtype="u1")
        tensors[f"wide.{number}"] = np.arange(3000, dtype="<f8") + number
    got = await load(checkpoints.shard(tensors))
    assert checkpoints.same(got, tensors)
    assert all(is_aligned(tensor) for tensor in got.values())


async def test_scalars_and_empty_tensors_have_their_shapes(checkpoints):
    tensors = {
        "scalar": np.array(3.5, "<f4"),
        "empty": np.zeros((0,), "<f8"),
        "no rows": np.zeros((3, 0, 2), ml_dtypes.bfloat16),
        "one": np.array([[7]], "<i8"),
    }
    got = await load(checkpoints.shard(tensors))
    assert sorted(got) == sorted(tensors)
    for name, tensor in tensors.items():
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype)
        assert np.array_equal(got[name], tensor)


async def test_a_tensor_that_numpy_cannot_shape_is_an_error_that_names_it(checkpoints):
    tensors = {"good": np.arange(4), "wild": checkpoints.Raw("F32", (0, 2**62, 2**62), b"")}
    loader = AsyncShardLoader(memory_budget_mb=1)
    got = []
    with pytest.raises(UnsupportedTensorError, match="wild") as caught:
        async with loader.stream(MemoryStore({"model.safetensors": checkpoints.shard(tensors)})) as stream:
            async for name, _ in stream:
                got.append(name)
    assert caught.value.tensor == "wild"
    assert got == ["good"]


async def test_an_array_that_is_delivered_may_be_written(checkpoints):
    tensors = checkpoints.tensors(3, nbytes=64)
    got = await load(checkpoints.shard(tensors))
    got["layer.1"][:] = 0
    assert np.array_equal(got["layer.0"], tensors["layer.0"])
    assert np.array_equal(got["layer.2"], tensors["layer.2"])
