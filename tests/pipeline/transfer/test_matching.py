"""Matching tensors with destinations: what fits, and what is refused before a byte is written."""

import logging

import numpy as np
import pytest

from asyncshard import AsyncShardLoader
from asyncshard.arrays.frameworks import load_library
from asyncshard.errors import DestinationError, NamesError
from asyncshard.format.dtypes import by_name
from asyncshard.pipeline.transfer.matching import fit
from asyncshard.testing import FaultyStore, MemoryStore


@pytest.fixture(scope="module")
def numpy():
    return load_library("np")


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


# --- how one tensor fits one array


def test_a_contiguous_array_of_the_same_dtype_takes_the_bytes_as_they_are(numpy):
    target = np.zeros((2, 3), "<f4")
    memory, strided, is_narrowed = fit(numpy, "w", by_name["F32"], (2, 3), target, cast=False)
    assert np.shares_memory(memory, target)
    assert (memory.shape, strided, is_narrowed) == ((2, 3), None, False)


def test_a_strided_array_gets_copies_of_elements(numpy):
    target = np.zeros((2, 6), "<f4")[:, ::2]
    _, strided, is_narrowed = fit(numpy, "w", by_name["F32"], (2, 3), target, cast=False)
    assert np.shares_memory(strided.target, target)
    assert not is_narrowed


def test_an_array_of_another_dtype_is_converted_into_if_that_is_asked_for(numpy):
    target = np.zeros(3, "<f8")
    _, strided, _ = fit(numpy, "w", by_name["F32"], (3,), target, cast=True)
    assert (strided.source, strided.target.dtype) == (np.dtype("<f4"), target.dtype)
    with pytest.raises(DestinationError, match="cast=True"):
        fit(numpy, "w", by_name["F32"], (3,), target, cast=False)


def test_a_larger_array_is_narrowed_to_its_first_corner(numpy):
    target = np.zeros((4, 5), "<f4")
    memory, strided, is_narrowed = fit(numpy, "w", by_name["F32"], (2, 3), target, cast=False)
    assert (memory.shape, memory.strides, is_narrowed) == ((2, 3), (20, 4), True)
    assert strided is not None


# --- what is refused before a byte is written

OVERLAPPING = np.zeros(100, "<f4")


def windows(*, stride):
    return np.lib.stride_tricks.as_strided(np.zeros(20, "<f4"), (4, 3), (stride, 4), writeable=True)


def read_only():
    array = np.zeros(4, "<f4")
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("destination", "words"),
    [
        (read_only(), "read-only"),
        (np.zeros(3, "<f4"), r"shape \[4\], its destination \[3\]"),
        (np.zeros((2, 2), "<f4"), "shape"),
        (np.zeros((4, 1), "<f4"), "shape"),
        (np.zeros(4, "<i4"), "dtype F32, its destination I32; pass cast=True"),
        (np.zeros(4, ">f4"), "a dtype the format does not have"),
        (np.zeros(4, "O"), "dtype object"),
        (np.zeros(4, "<c16"), "complex128"),
        ([0.0] * 4, "list"),
        (None, "NoneType"),
        (np.broadcast_to(np.zeros(1, "<f4"), 4), "read-only"),
        (np.lib.stride_tricks.as_strided(np.zeros(1, "<f4"), (4,), (0,), writeable=True), "elements share memory"),
        (np.lib.stride_tricks.as_strided(np.zeros(4, "<f4"), (4,), (2,), writeable=True), "elements share memory"),
    ],
)
async def test_a_destination_that_cannot_take_its_tensor_is_an_error_that_names_it(checkpoints, destination, words):
    other = np.zeros(4, "<f4")
    with pytest.raises(DestinationError, match=words) as caught:
        await fill(
            checkpoints.shard({"other": weights(4), "model.w": weights(4)}), {"other": other, "model.w": destination}
        )
    assert "model.w" in str(caught.value)
    assert not other.any()


async def test_windows_that_share_elements_are_refused_and_others_are_filled(checkpoints):
    data = checkpoints.shard({"w": weights(4, 3)})
    with pytest.raises(DestinationError, match="elements share memory"):
        await fill(data, {"w": windows(stride=8)})
    apart = windows(stride=16)
    await fill(data, {"w": apart})
    assert np.array_equal(apart, weights(4, 3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (OVERLAPPING[:10], OVERLAPPING[9:19]),
        (OVERLAPPING[0:20:2], OVERLAPPING[:10]),
        (OVERLAPPING[0:20:2], OVERLAPPING[2:22:2]),
        (OVERLAPPING[:10], OVERLAPPING[9::-1]),
    ],
)
async def test_destinations_that_share_memory_are_an_error_that_names_both(checkpoints, one, other):
    OVERLAPPING[:] = 0
    with pytest.raises(DestinationError, match="'a' and 'b' share memory"):
        await fill(checkpoints.shard({"a": weights(10), "b": weights(10)}), {"a": one, "b": other})
    assert not OVERLAPPING.any()


async def test_all_problems_are_told_at_once(checkpoints):
    tensors = {f"w.{number}": weights(4) for number in range(5)}
    into = {name: np.zeros(3, "<f4") for name in tensors}
    with pytest.raises(DestinationError) as caught:
        await fill(checkpoints.shard(tensors), into)
    assert all(name in str(caught.value) for name in tensors)


async def test_bytes_cannot_be_cast(checkpoints):
    tensors = {"w": checkpoints.Raw("F4", (8,), bytes(4))}
    with pytest.raises(DestinationError, match="F4"):
        await fill(checkpoints.shard(tensors), {"w": np.zeros(4, "<f4")}, cast=True)


async def test_a_strict_load_names_missing_and_unexpected_tensors(checkpoints):
    data = checkpoints.shard({"both": weights(4), "extra": weights(4)})
    into = {"both": np.zeros(4, "<f4"), "absent": np.zeros(4, "<f4")}
    with pytest.raises(NamesError) as caught:
        await fill(data, into)
    assert (caught.value.missing, caught.value.unexpected) == (("absent",), ("extra",))
    assert not into["both"].any()
    stream = await fill(data, into, strict=False)
    assert (stream.statistics().missing, stream.statistics().unexpected) == (("absent",), ("extra",))
    assert np.array_equal(into["both"], weights(4))
    assert stream.statistics().bytes_total == 16


async def test_tied_and_empty_destinations_are_not_missing(checkpoints):
    shared = np.zeros((4, 4), "<f4")
    into = {"embed": shared, "head": shared, "row": shared[1], "none": np.zeros((0, 5), "<f4")}
    await fill(checkpoints.shard({"embed": weights(4, 4)}), into)
    assert np.array_equal(into["head"], weights(4, 4))


async def test_names_that_do_not_match_are_logged_where_they_are_no_error(checkpoints, caplog):
    data = checkpoints.shard({"extra": weights(4), "w": weights(2)})
    with caplog.at_level(logging.WARNING, "asyncshard"):
        await fill(data, {"absent": np.zeros(4, "<f4"), "w": np.zeros(3, "<f4")}, strict=False)
    words = ("missing from the checkpoint", "were not asked for", "fill their first corner")
    assert [any(word in record.getMessage() for record in caplog.records) for word in words] == [True] * 3
