"""Loading into the caller's own arrays: what they hold afterwards. What is refused before: test_matching.py."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import AsyncShardLoader
from asyncshard.errors import DestinationError, NamesError
from asyncshard.format.dtypes import DTYPES, by_name
from asyncshard.testing import FaultyStore, MemoryStore

CASTABLE = [dtype.name for dtype in DTYPES if dtype.numpy is not None]


async def fill(data, into, *, strict=True, cast=False, **tuning):
    loader = AsyncShardLoader(**{"memory_budget_mb": 1, **tuning})
    store = FaultyStore(MemoryStore({"model.safetensors": data}))
    stream = loader.stream(store, into=into, strict=strict, cast=cast)
    try:
        await stream.drain()
    except (DestinationError, NamesError):
        assert store.reads_begun == 0
        raise
    finally:
        assert loader.budget.bytes_used == 0
    return stream


def weights(*shape, dtype="<f4"):
    return np.arange(1, 1 + int(np.prod(shape, dtype=int))).reshape(shape).astype(dtype)


# --- views of every kind


@st.composite
def views(draw, max_dims=4):
    """An array; a view of it with distinct elements, sliced, reversed, transposed; where these are in the array."""
    dtype = by_name[draw(st.sampled_from(CASTABLE))].numpy
    shape = draw(st.lists(st.integers(1, 7), max_size=max_dims))
    base = np.zeros(shape, dtype)
    places = np.arange(base.size).reshape(shape)
    index = [slice(draw(st.integers(0, size)), None, draw(st.sampled_from([1, 1, 2, 3]))) for size in shape]
    if draw(st.booleans()):
        index = [slice(None, None, draw(st.sampled_from([1, -1, -2]))) for _ in shape]
    axes = draw(st.permutations(range(len(shape))))
    return base, base[(*index, ...)].transpose(axes), places[(*index, ...)].transpose(axes)


@given(st.lists(views(), min_size=1, max_size=5), st.sampled_from([64, 128, 1 << 20]), st.integers(0, 2**32))
async def test_views_of_any_kind_receive_what_an_assignment_would_give_them(checkpoints, targets, chunk_size, seed):
    random = np.random.default_rng(seed)
    tensors, into, expected = {}, {}, []
    for number, (base, view, places) in enumerate(targets):
        data = random.integers(0, 2 if base.dtype == np.bool_ else 256, view.size * view.itemsize, np.uint8)
        tensors[f"{number}"] = data.view(view.dtype).reshape(view.shape)
        into[f"{number}"] = view
        whole = np.zeros_like(base)
        whole.reshape(-1)[places] = tensors[f"{number}"]
        expected.append(whole)
    await fill(checkpoints.shard(tensors), into, chunk_size=chunk_size)
    for (base, _, _), whole in zip(targets, expected, strict=True):
        assert checkpoints.bytes_of(base) == checkpoints.bytes_of(whole)


async def test_every_dtype_goes_into_an_array_of_its_own_type(checkpoints):
    tensors = checkpoints.every_dtype()
    into = {}
    for name in tensors:
        kind = by_name[name].numpy
        into[name] = np.zeros(24 * by_name[name].bits // 8, "u1") if kind is None else np.zeros(24, kind)
    await fill(checkpoints.shard(tensors, padding=3), into)
    assert checkpoints.same(into, tensors)


async def test_scalars_and_empty_arrays_are_filled(checkpoints):
    tensors = {"scalar": np.array(2.5), "empty": np.zeros((0, 3), "<f4")}
    into = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    stream = await fill(checkpoints.shard(tensors), into)
    assert into["scalar"] == 2.5
    assert stream.statistics().tensors_done == 2


async def test_views_of_one_fused_parameter_are_filled_side_by_side(checkpoints):
    tensors = {"q": weights(4, 8), "k": weights(2, 8) + 100, "v": weights(2, 8) + 200}
    fused = np.zeros((8, 8), "<f4")
    into = {"q": fused[:4], "k": fused[4:6], "v": fused[6:]}
    await fill(checkpoints.shard(tensors), into)
    assert np.array_equal(fused, np.concatenate(list(tensors.values())))


async def test_views_of_interleaved_columns_and_rows_do_not_overlap(checkpoints):
    tensors = {"even": weights(6, 4), "odd": weights(6, 4) + 100}
    fused = np.zeros((6, 8), "<f4")
    await fill(checkpoints.shard(tensors), {"even": fused[:, ::2], "odd": fused[:, 1::2]})
    assert np.array_equal(fused[:, ::2], tensors["even"])
    assert np.array_equal(fused[:, 1::2], tensors["odd"])
    rows = np.zeros((12, 4), "<f4")
    await fill(checkpoints.shard(tensors), {"even": rows[::2], "odd": rows[1::2]})
    assert np.array_equal(rows[1::2], tensors["odd"])


async def test_a_contiguous_row_between_strided_ones_does_not_overlap_them(checkpoints):
    tensors = {"outer": weights(2, 4), "inner": weights(1, 4) + 100}
    fused = np.zeros((3, 4), "<f4")
    await fill(checkpoints.shard(tensors), {"outer": fused[::2], "inner": fused[1:2]})
    assert np.array_equal(fused[::2], tensors["outer"])
    assert np.array_equal(fused[1:2], tensors["inner"])


async def test_a_larger_array_is_filled_in_its_first_corner(checkpoints):
    tensors = {"w": weights(3, 5), "b": weights(4)}
    into = {"w": np.full((4, 8), -1, "<f4"), "b": np.full(6, -1, "<f4")}
    stream = await fill(checkpoints.shard(tensors), into)
    assert stream.narrowed == ("w", "b")
    assert np.array_equal(into["w"][:3, :5], tensors["w"])
    assert np.array_equal(into["b"][:4], tensors["b"])
    assert (into["w"][3:] == -1).all()
    assert (into["w"][:, 5:] == -1).all()
    assert (into["b"][4:] == -1).all()


@given(st.sampled_from(CASTABLE), st.sampled_from(CASTABLE), st.integers(0, 300), st.booleans())
async def test_cast_gives_what_numpy_gives(checkpoints, ours, theirs, size, is_strided):
    source, kind = by_name[ours].numpy, by_name[theirs].numpy
    values = (np.arange(size) % 7).astype("<f4").astype(source)
    target = np.zeros(2 * size, kind)[::2] if is_strided else np.zeros(size, kind)
    data = checkpoints.shard({"w": values})
    if ours != theirs and (ours == "C64" or not np.can_cast(source, kind, "unsafe")):
        with pytest.raises(DestinationError, match="cannot be converted"):
            await fill(data, {"w": target}, cast=True)
        return
    await fill(data, {"w": target}, cast=True, chunk_size=64)
    with np.errstate(all="ignore"):
        assert checkpoints.bytes_of(target) == checkpoints.bytes_of(values.astype(kind))


async def test_a_cast_of_several_blocks_is_whole(checkpoints):
    values = np.random.default_rng(0).standard_normal(300_001).astype("<f4")
    target = np.zeros(300_001, ml_dtypes.bfloat16)
    await fill(checkpoints.shard({"w": values}), {"w": target}, cast=True, chunk_size=4096 + 64)
    assert checkpoints.bytes_of(target) == checkpoints.bytes_of(values.astype(ml_dtypes.bfloat16))


# --- what is read and delivered


async def test_what_nobody_wants_is_not_read(checkpoints):
    tensors = {f"w.{number}": weights(1024) for number in range(8)}
    store = FaultyStore(MemoryStore({"model.safetensors": checkpoints.shard(tensors)}))
    into = {name: np.zeros(1024, "<f4") for name in ("w.1", "w.2", "w.6")}
    stream = AsyncShardLoader(memory_budget_mb=1).stream(store, into=into, strict=False)
    assert [name async for name, _ in stream] == ["w.1", "w.2", "w.6"]
    assert store.reads_begun == 2
    assert stream.statistics().bytes_done == 3 * 4096


async def test_the_stream_yields_what_was_given(checkpoints):
    tensors = {"w": weights(4, 4), "b": weights(4)}
    into = {"w": np.zeros((4, 8), "<f4")[:, ::2], "b": np.zeros(4, "<f4")}
    stream = AsyncShardLoader(memory_budget_mb=1).stream(
        MemoryStore({"model.safetensors": checkpoints.shard(tensors)}), into=into
    )
    async for name, destination in stream:
        assert destination is into[name]
        assert np.array_equal(destination, tensors[name])
