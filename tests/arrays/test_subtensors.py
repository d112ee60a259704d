import time

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import _core
from asyncshard.arrays.memory import MemoryBounds, memory_bounds
from asyncshard.arrays.subtensors import SubtensorFilter

filter_subtensors = SubtensorFilter.filter_subtensors


def numpy_addresses(array):
    """Every byte of every element, one by one."""
    base = array.__array_interface__["data"][0]
    return {
        base + sum(i * stride for i, stride in zip(index, array.strides, strict=True)) + byte
        for index in np.ndindex(array.shape)
        for byte in range(array.itemsize)
    }


def torch_addresses(tensor):
    return {
        tensor[index].data_ptr() + byte for index in np.ndindex(tuple(tensor.shape)) for byte in range(tensor.itemsize)
    }


def is_contiguous(tensor):
    return tensor.flags.c_contiguous if isinstance(tensor, np.ndarray) else tensor.is_contiguous()


def filter_by_bytes(tensors, addresses):
    """The rule over sets of bytes: a contiguous cover's bytes are all there are between its ends."""
    bytes_of = {name: addresses(tensor) for name, tensor in tensors.items()}
    kept = []
    for name, own in bytes_of.items():
        if not own:
            continue
        for other, cover in bytes_of.items():
            if other == name or not is_contiguous(tensors[other]) or not own <= cover:
                continue
            same = min(own) == min(cover) and max(own) == max(cover)
            if not same or not is_contiguous(tensors[name]) or other < name:
                break
        else:
            kept.append(name)
    return kept


def uncovered_one_by_one(rows):
    kept = []
    for start, stop, contiguous, group, name_rank in rows:
        covered = any(
            contiguous2
            and group2 == group
            and start2 <= start
            and stop <= stop2
            and ((start2, stop2) != (start, stop) or not contiguous or name_rank2 < name_rank)
            for start2, stop2, contiguous2, group2, name_rank2 in rows
        )
        kept.append(not covered)
    return kept


@st.composite
def cuts(draw, base):
    """Views of a 4 by 6 array: slices with steps, transposed, reversed for NumPy, broadcast, reinterpreted."""
    steps = st.sampled_from([1, 1, 2, 3] + ([-1, -2] if isinstance(base, np.ndarray) else []))
    view = base
    for dim, size in enumerate(base.shape):
        ends = sorted([draw(st.integers(0, size)), draw(st.integers(0, size))])
        step = draw(steps)
        cut = slice(*ends, step) if step > 0 else slice(ends[1] - 1 if ends[1] else 0, None, step)
        view = view[(slice(None),) * dim + (cut,)]
    shape = draw(st.sampled_from(["as is", "transposed", "row", "column", "broadcast", "flat", "bytes"]))
    if shape == "transposed":
        view = view.T
    elif shape == "row" and view.shape[0]:
        view = view[0]
    elif shape == "column" and view.shape[1]:
        view = view[:, 0]
    elif shape == "broadcast" and view.shape[0] and view.shape[1]:
        view = np.broadcast_to(view[:1], (3, view.shape[1])) if isinstance(view, np.ndarray) else view[:1].expand(3, -1)
    elif shape == "flat":
        view = base.reshape(-1)[draw(st.integers(0, 23)) : draw(st.integers(0, 24))]
    elif shape == "bytes":
        view = base[draw(st.integers(0, 3)) :].view(np.uint8 if isinstance(view, np.ndarray) else torch.uint8)
    return view


NAMES = st.text("abc", min_size=1, max_size=3)


@given(st.dictionaries(NAMES, cuts(np.arange(24, dtype=np.int16).reshape(4, 6)), max_size=12))
def test_numpy_views_are_filtered_as_their_bytes_say(tensors):
    kept = filter_subtensors(tensors)
    assert list(kept) == filter_by_bytes(tensors, numpy_addresses)
    assert all(kept[name] is tensors[name] for name in kept)


@given(st.dictionaries(NAMES, cuts(torch.arange(24, dtype=torch.int16).reshape(4, 6)), max_size=12))
def test_torch_views_are_filtered_as_the_addresses_of_their_elements_say(tensors):
    kept = filter_subtensors(tensors)
    assert list(kept) == filter_by_bytes(tensors, torch_addresses)
    assert all(kept[name] is tensors[name] for name in kept)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans(), st.integers(0, 2)), max_size=30),
    st.randoms(use_true_random=False),
)
def test_kernel_is_the_quadratic_rule(intervals, random):
    name_ranks = list(range(len(intervals)))
    random.shuffle(name_ranks)
    rows = [
        (start, start + length, contiguous, group, name_rank)
        for (start, length, contiguous, group), name_rank in zip(intervals, name_ranks, strict=True)
    ]
    columns = list(zip(*rows, strict=True)) or [()] * 5
    dtypes = (np.uint64, np.uint64, np.uint8, np.int64, np.int64)
    keep = np.full(len(rows), 9, np.uint8)
    _core.find_uncovered(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)), keep)
    assert keep.tolist() == uncovered_one_by_one(rows)


def test_kernel_takes_the_highest_addresses():
    top = 2**64 - 1
    starts, stops = np.array([top - 4, top - 2], np.uint64), np.array([top, top], np.uint64)
    keep = np.empty(2, np.uint8)
    _core.find_uncovered(starts, stops, np.ones(2, np.uint8), np.zeros(2, np.int64), np.arange(2), keep)
    assert keep.tolist() == [1, 0]


def test_kernel_refuses_columns_that_do_not_fit():
    one, two = np.ones(1, np.uint64), np.full(1, 2, np.uint64)
    flags, numbers, keep = np.ones(1, np.uint8), np.zeros(1, np.int64), np.zeros(1, np.uint8)
    with pytest.raises(ValueError, match="before its start"):
        _core.find_uncovered(two, one, flags, numbers, numbers, keep)
    with pytest.raises(ValueError, match="one length"):
        _core.find_uncovered(one, two, flags, numbers, numbers, np.zeros(2, np.uint8))


@pytest.fixture(params=["numpy", "torch"])
def zeros(request):
    return np.zeros if request.param == "numpy" else torch.zeros


def test_views_of_a_whole_are_dropped_and_order_is_kept(zeros):
    whole, other = zeros((4, 8)), zeros(3)
    tensors = {"z.part": whole[1], "other": other, "whole": whole, "a.part": whole[:, 2:4]}
    assert list(filter_subtensors(tensors)) == ["other", "whole"]


def test_the_smaller_name_stays_for_the_same_memory(zeros):
    whole = zeros((4, 8))
    tensors = {"lm_head": whole, "embed": whole.reshape(32), "tied": whole[:]}
    assert list(filter_subtensors(tensors)) == ["embed"]


def test_a_chain_of_covers_keeps_the_outermost(zeros):
    whole = zeros(16)
    assert list(filter_subtensors({"a": whole[4:6], "b": whole[2:8], "c": whole})) == ["c"]


def test_partial_overlaps_stay(zeros):
    whole = zeros(16)
    assert list(filter_subtensors({"a": whole[:10], "b": whole[6:]})) == ["a", "b"]


def test_the_contiguous_tensor_of_the_same_memory_stays_whatever_its_name(zeros):
    whole = zeros((4, 8))
    assert list(filter_subtensors({"a": whole.T, "b": whole})) == ["b"]


def test_a_tensor_with_gaps_covers_nothing_not_even_its_equal(zeros):
    whole = zeros((4, 8))
    assert list(filter_subtensors({"a": whole[:, :7], "b": whole[:, :7], "c": whole[1, 2:4]})) == ["a", "b", "c"]
    assert list(filter_subtensors({"a": whole.T, "b": whole.T})) == ["a", "b"]


def test_neighbours_in_memory_are_not_covers(zeros):
    whole = zeros(16)
    assert list(filter_subtensors({"a": whole[:8], "b": whole[8:], "c": whole[7:8]})) == ["a", "b"]


def test_empty_tensors_are_dropped(zeros):
    whole = zeros((4, 8))
    assert list(filter_subtensors({"a": whole[2:2], "b": zeros((0, 3)), "c": whole[1]})) == ["c"]
    assert filter_subtensors({}) == {}


def test_an_instance_of_the_filter_filters_too(zeros):
    whole = zeros(4)
    assert list(SubtensorFilter().filter_subtensors({"a": whole[:2], "b": whole})) == ["b"]


def test_reversed_numpy_views_span_their_true_bytes():
    whole = np.zeros(8, np.int32)
    start = whole.ctypes.data
    assert memory_bounds(whole[6:1:-2]) == MemoryBounds("numpy", start + 8, start + 28, False)
    assert list(filter_subtensors({"a": whole[::-1], "b": whole})) == ["b"]
    assert list(filter_subtensors({"a": whole[3::-1], "b": whole[2:]})) == ["a", "b"]


def test_numpy_memory_is_one_space_whoever_owns_it():
    raw = bytearray(64)
    tensors = {"a": np.frombuffer(raw, np.uint8), "b": np.frombuffer(raw, ml_dtypes.bfloat16)[3:9]}
    assert list(filter_subtensors(tensors)) == ["a"]
    scalar = tensors["a"][5:6].reshape(())
    assert list(filter_subtensors({**tensors, "c": scalar})) == ["a"]


def test_torch_storages_are_told_apart():
    tensors = {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}
    assert list(filter_subtensors(tensors)) == ["a", "b", "c"]


def test_parameters_and_other_dtypes_of_one_storage_are_compared():
    weight = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.bfloat16))
    tensors = {"param": weight, "bytes": weight.detach().view(torch.uint8)[1:2], "half": weight.data[2:]}
    assert list(filter_subtensors(tensors)) == ["param"]


def test_torch_tensors_without_memory_of_their_own_stay():
    meta = torch.zeros(4, device="meta")
    freed = torch.zeros(4)
    freed.untyped_storage().resize_(0)
    sparse = torch.eye(3).to_sparse()
    tensors = {"a": meta, "b": meta[:2], "c": sparse, "d": sparse, "e": freed, "f": freed}
    assert list(filter_subtensors(tensors)) == list(tensors)
    assert filter_subtensors({"a": torch.zeros(0, device="meta")}) == {}


def test_wrapper_tensors_without_storage_stay():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (4,), device="cpu")
    assert list(filter_subtensors({"a": wrapper, "b": wrapper})) == ["a", "b"]


def test_fake_tensors_stay():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(4)
    assert list(filter_subtensors({"a": fake, "b": fake})) == ["a", "b"]


def test_a_value_that_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="tensor 'b' is neither a numpy array nor a torch tensor: list"):
        filter_subtensors({"a": np.zeros(1), "b": [1]})


@pytest.mark.parametrize("contiguous_step", [1, 2])
def test_a_hundred_thousand_views_of_one_storage_take_no_quadratic_time(zeros, contiguous_step):
    whole = zeros(100_100)
    tensors = {str(i): whole[i : i + 50 : contiguous_step] for i in range(100_000)}
    start = time.perf_counter()
    assert len(filter_subtensors(tensors)) == 100_000
    tensors["whole"] = whole
    assert list(filter_subtensors(tensors)) == ["whole"]
    assert time.perf_counter() - start < 10  # about 0.8 s; a quadratic one takes an hour
