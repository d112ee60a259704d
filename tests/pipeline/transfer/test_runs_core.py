"""The kernels of runs against plain Python."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard._core import StopFlag, copy_runs, gather_runs, read_ranges


def offsets_of(values):
    return np.array(values, np.int64)


@st.composite
def run_lists(draw):
    """Ascending ranges of a file, with the bytes after the last."""
    at, ranges = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=30)):
        ranges.append((at + gap, length))
        at += gap + length
    return ranges, at + draw(st.integers(0, 5))


def cut(total, sizes):
    """Buffers of `total` bytes in sum, of the sizes as far as they go."""
    buffers = []
    for size in sizes:
        size = min(size, total)
        buffers.append(bytearray(size))
        total -= size
    return [*buffers, bytearray(total)]


@given(run_lists(), st.lists(st.integers(0, 70), max_size=10), st.randoms())
def test_runs_are_gathered_scattered_and_spread_over_buffers_as_slices_are(runs, sizes, random):
    ranges, total = runs
    source = random.randbytes(total)
    expected = b"".join(source[start : start + length] for start, length in ranges)
    offsets, lengths = offsets_of([start for start, _ in ranges]), offsets_of([length for _, length in ranges])
    places = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) if ranges else lengths
    gathered = bytearray(len(expected))
    copy_runs(source, gathered, offsets, places, lengths)
    assert gathered == expected
    scattered = bytearray(total)
    copy_runs(gathered, scattered, places, offsets, lengths)
    for start, length in ranges:
        assert scattered[start : start + length] == source[start : start + length]
    buffers = cut(len(expected), sizes)
    gather_runs(source, offsets, lengths, buffers)
    assert b"".join(buffers) == expected


@given(run_lists(), st.lists(st.integers(0, 70), max_size=10), st.integers(0, 60), st.randoms())
def test_ranges_of_a_file_are_read_whatever_the_gap(tmp_path_factory, runs, sizes, max_gap, random):
    ranges, total = runs
    source = random.randbytes(total)
    path = tmp_path_factory.getbasetemp() / "ranges"
    path.write_bytes(source)
    expected = b"".join(source[start : start + length] for start, length in ranges)
    buffers = cut(len(expected), sizes)
    fd = os.open(path, os.O_RDONLY)
    try:
        result = read_ranges(
            fd, offsets_of([r[0] for r in ranges]), offsets_of([r[1] for r in ranges]), buffers, max_gap, StopFlag()
        )
    finally:
        os.close(fd)
    assert result == (len(expected), 0)
    assert b"".join(buffers) == expected


def read(path, ranges, *, max_gap=0, stop=None, nbytes=None):
    nbytes = sum(length for _, length in ranges) if nbytes is None else nbytes
    buffer = np.zeros(nbytes, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        result = read_ranges(
            fd,
            offsets_of([r[0] for r in ranges]),
            offsets_of([r[1] for r in ranges]),
            [buffer],
            max_gap,
            stop or StopFlag(),
        )
    finally:
        os.close(fd)
    return result, buffer


def test_ranges_larger_than_the_scratch_and_than_a_step_are_read(tmp_path):
    data = np.random.default_rng(0).integers(0, 255, 6 << 20, np.uint8)
    data.tofile(tmp_path / "x")
    ranges = [(7, 3 << 20), ((3 << 20) + 10, 200_000), ((3 << 20) + 200_020, 200_000), (5 << 20, 1 << 20)]
    for max_gap in (0, 1000, 1 << 30):
        result, got = read(tmp_path / "x", ranges, max_gap=max_gap)
        assert result == (len(got), 0)
        assert np.array_equal(got, np.concatenate([data[start : start + length] for start, length in ranges]))


@pytest.mark.parametrize(("max_gap", "expected"), [(0, 15), (100, 0)])
def test_the_end_of_the_file_ends_the_read(tmp_path, max_gap, expected):
    (tmp_path / "x").write_bytes(bytes(25))
    result, _ = read(tmp_path / "x", [(0, 10), (20, 10)], max_gap=max_gap)
    assert result == (expected, 0)


def test_a_failed_read_tells_its_number(tmp_path):
    result = read_ranges(-1, offsets_of([0]), offsets_of([1]), [bytearray(1)], 0, StopFlag())
    assert result == (0, 9)


def test_a_stopped_read_reads_nothing(tmp_path):
    (tmp_path / "x").write_bytes(bytes(25))
    stop = StopFlag()
    stop.set()
    assert read(tmp_path / "x", [(0, 10), (20, 5)], stop=stop)[0] == (0, 0)


@pytest.mark.parametrize(
    ("ranges", "nbytes"),
    [([(0, 10), (5, 10)], 20), ([(0, -1)], 0), ([(-1, 5)], 5), ([(0, 10)], 9), ([(2**62, 2**62)], 8)],
)
def test_ranges_out_of_order_or_of_another_sum_are_an_error(tmp_path, ranges, nbytes):
    (tmp_path / "x").write_bytes(bytes(25))
    with pytest.raises(ValueError, match="range"):
        read(tmp_path / "x", ranges, nbytes=nbytes)


@pytest.mark.parametrize(
    ("source", "target", "length"),
    [(0, 0, 11), (11, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 5, 1), (0, 0, -1), (0, 0, 2**62)],
)
def test_a_run_outside_its_buffer_is_an_error(source, target, length):
    with pytest.raises(ValueError, match="run 0 lies outside"):
        copy_runs(bytes(10), bytearray(5), *map(offsets_of, ([source], [target], [length])))


def test_runs_that_do_not_fit_each_other_or_share_memory_are_an_error():
    with pytest.raises(ValueError, match="differ in length"):
        copy_runs(bytes(10), bytearray(5), *map(offsets_of, ([0], [0, 1], [1])))
    with pytest.raises(ValueError, match="differ in length"):
        gather_runs(bytes(10), offsets_of([0]), offsets_of([]), [])
    with pytest.raises(ValueError, match="lies outside"):
        gather_runs(bytes(10), offsets_of([6]), offsets_of([5]), [bytearray(5)])
    with pytest.raises(ValueError, match="5 bytes and the buffers 4"):
        gather_runs(bytes(10), offsets_of([0]), offsets_of([5]), [bytearray(4)])
    memory = np.zeros(10, np.uint8)
    with pytest.raises(ValueError, match="share memory"):
        copy_runs(memory[:6], memory[5:], *map(offsets_of, ([0], [0], [1])))
    with pytest.raises(ValueError, match="share memory"):
        gather_runs(memory[:6], offsets_of([0]), offsets_of([1]), [memory[5:6]])
    with pytest.raises(ValueError, match="differ in length"):
        read_ranges(0, offsets_of([0]), offsets_of([]), [], 0, StopFlag())
