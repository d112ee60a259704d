import errno
import gc
import os
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard._core import Lease, Region, ReturnList, Span, StopFlag, read_vectors, spread

PAGE = 4096


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


# --- regions and leases


def test_a_region_takes_memory_only_where_it_is_written():
    before = resident_bytes()
    region = Region(8 << 30)
    assert resident_bytes() - before < 8 << 20
    np.frombuffer(Lease(region, 0, 1, ReturnList(), 0), "u1")[:] = 1
    assert resident_bytes() - before < 16 << 20


def test_a_lease_is_that_part_of_its_region():
    region, returns = Region(1 << 20), ReturnList()
    whole = np.frombuffer(Lease(region, 0, 1 << 20, returns, 0), "u1")
    part = Lease(region, 1000, 50, returns, 1)
    assert (part.start, part.nbytes, len(part)) == (1000, 50, 50)
    view = memoryview(part)
    assert (view.nbytes, view.format, view.readonly, view.contiguous) == (50, "B", False, True)
    view[:] = bytes(range(50))
    assert bytes(whole[999:1051]) == b"\0" + bytes(range(50)) + b"\0"
    assert whole.__array_interface__["data"][0] % (2 << 20) == 0
    assert part.address == whole.__array_interface__["data"][0] + 1000


@pytest.mark.parametrize(("start", "nbytes"), [(4097, 0), (0, 4097), (4096, 1), (1, 2**64 - 1), (2**64 - 1, 2)])
def test_a_lease_outside_its_region_is_an_error(start, nbytes):
    with pytest.raises(ValueError, match="outside"):
        Lease(Region(4096), start, nbytes, ReturnList(), 0)


@pytest.mark.parametrize("nbytes", [0, 2**60])
def test_a_region_of_no_or_absurd_size_is_an_error(nbytes):
    with pytest.raises(ValueError, match="cannot be reserved"):
        Region(nbytes)


def test_a_region_that_the_system_refuses_is_an_os_error():
    with pytest.raises(OSError, match="cannot reserve") as caught:
        Region(1 << 55)
    assert caught.value.errno == errno.ENOMEM


def views_of_numpy(lease):
    array = np.frombuffer(lease, "<f4")
    return array[10:20].reshape(2, 5).T


def views_of_ndarray(lease):
    return np.ndarray((4, 4), "<f4", lease, 16)[1:]


def views_of_torch(lease):
    torch = pytest.importorskip("torch")
    tensor = torch.frombuffer(lease, dtype=torch.float32)
    return torch.nn.Parameter(tensor.view(-1)[3:].detach())


def views_of_torch_in_numpy(lease):
    torch = pytest.importorskip("torch")
    return torch.frombuffer(lease, dtype=torch.float32)[1:].numpy()


def views_of_memory(lease):
    return memoryview(lease)[5:]


@pytest.mark.parametrize(
    "view_of", [views_of_numpy, views_of_ndarray, views_of_torch, views_of_torch_in_numpy, views_of_memory]
)
def test_a_lease_returns_exactly_when_its_last_view_dies(view_of):
    region, returns = Region(1 << 20), ReturnList()
    view = view_of(Lease(region, 0, 4096, returns, 77))
    gc.collect()
    assert returns.collect() == []
    del view
    assert returns.collect() == [77]
    assert returns.collect() == []


def test_leases_return_from_any_thread_and_from_the_garbage_collector():
    region, returns = Region(1 << 20), ReturnList()

    def hold_and_drop(first):
        leases = [Lease(region, 0, 8, returns, token) for token in range(first, first + 1000)]
        cycle = [leases]
        cycle.append(cycle)

    threads = [threading.Thread(target=hold_and_drop, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert sorted(returns.collect()) == list(range(4000))


def test_a_lease_keeps_its_region_and_a_list_that_dies_first_is_no_harm():
    region, returns = Region(1 << 20), ReturnList()
    array = np.frombuffer(Lease(region, 4096, 4096, returns, 1), "u1")
    del region, returns
    array[:] = 7
    assert array.sum() == 7 * 4096


def test_a_dying_lease_wakes_only_while_it_is_awaited():
    region, returns = Region(1 << 20), ReturnList()
    woken = []
    returns.wake = lambda: woken.append(1)
    Lease(region, 0, 8, returns, 1)
    assert woken == []
    returns.is_awaited = True
    Lease(region, 0, 8, returns, 2)
    assert woken == [1]
    assert sorted(returns.collect()) == [1, 2]


def test_a_wake_that_fails_is_no_harm():
    region, returns = Region(1 << 20), ReturnList()

    def wake():
        raise RuntimeError("the loop is closed")

    returns.wake, returns.is_awaited = wake, True
    Lease(region, 0, 8, returns, 1)
    assert returns.collect() == [1]


def test_discarded_pages_read_as_zeros_and_their_neighbours_stay():
    region, returns = Region(1 << 20), ReturnList()
    array = np.frombuffer(Lease(region, 0, 1 << 20, returns, 0), "u1")
    array[:] = 1
    region.discard(100, 3 * PAGE + 100)
    assert array[:PAGE].all()
    assert not array[PAGE : 3 * PAGE].any()
    assert array[3 * PAGE :].all()
    region.discard(5, 5)
    for start, stop in ((2, 1), (0, (1 << 20) + 1)):
        with pytest.raises(ValueError, match="outside"):
            region.discard(start, stop)


def test_a_dying_lease_discards_its_pages_where_that_is_asked_for():
    region, returns = Region(1 << 20), ReturnList()
    whole = np.frombuffer(Lease(region, 0, 1 << 20, returns, 0), "u1")
    whole[:] = 1
    returns.discards = True
    Lease(region, PAGE, 2 * PAGE, returns, 1)
    assert not whole[PAGE : 3 * PAGE].any()
    assert whole.sum() == (1 << 20) - 2 * PAGE


# --- spans


def test_a_span_is_the_memory_at_an_address_and_keeps_its_owner():
    owner = np.arange(100, dtype="u1")
    alive = weakref.ref(owner)
    span = Span(owner.__array_interface__["data"][0] + 10, 20, owner)
    view = memoryview(span)
    assert bytes(view) == bytes(range(10, 30))
    view[0] = 255
    assert owner[10] == 255
    del owner, span
    assert alive() is not None
    del view
    assert alive() is None


def test_a_span_at_address_0_must_be_empty():
    assert len(Span(0, 0, None)) == 0
    with pytest.raises(ValueError, match="address 0"):
        Span(0, 1, None)


# --- spread


@st.composite
def pieces(draw):
    sources, targets, lengths = [], [], []
    source = target = 0
    for _ in range(draw(st.integers(0, 12))):
        source += draw(st.integers(0, 5))
        target = max(target, source) + draw(st.integers(0, 9))
        length = draw(st.integers(0, 20))
        sources.append(source)
        targets.append(target)
        lengths.append(length)
        source += length
        target += length
    return sources, targets, lengths, max(source, target) + draw(st.integers(0, 5))


@given(pieces(), st.integers(0, 255))
def test_spread_moves_each_piece_as_copies_would(parts, seed):
    sources, targets, lengths, size = parts
    buffer = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    expected = buffer.copy()
    for source, target, length in zip(sources, targets, lengths, strict=True):
        expected[target : target + length] = buffer[source : source + length]
    spread(buffer, *(np.array(numbers, np.int64) for numbers in (sources, targets, lengths)))
    for target, length in zip(targets, lengths, strict=True):
        assert np.array_equal(buffer[target : target + length], expected[target : target + length])


@pytest.mark.parametrize(
    ("sources", "targets", "lengths"),
    [
        ([0, 4], [0, 4], [5, 1]),
        ([0, 5], [0, 4], [5, 1]),
        ([4], [3], [1]),
        ([0], [8], [3]),
        ([0], [0], [11]),
        ([0], [0], [-1]),
        ([0], [2**62], [2**62]),
        ([-1], [0], [1]),
        ([0, 1], [0], [1]),
        ([0], [0], [1, 1]),
    ],
)
def test_spread_refuses_pieces_that_overlap_or_leave_the_buffer(sources, targets, lengths):
    buffer = np.arange(10, dtype=np.uint8)
    with pytest.raises(ValueError):
        spread(buffer, *(np.array(numbers, np.int64) for numbers in (sources, targets, lengths)))
    assert np.array_equal(buffer, np.arange(10))


# --- read_vectors

CONTENT = np.random.default_rng(0).bytes((3 << 20) + 17)


@pytest.fixture(scope="module")
def fd(tmp_path_factory):
    path = tmp_path_factory.mktemp("reads") / "content"
    path.write_bytes(CONTENT)
    number = os.open(path, os.O_RDONLY)
    yield number
    os.close(number)


@given(
    offset=st.integers(0, len(CONTENT)),
    sizes=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1 << 12), st.integers(0, 2 << 20)), max_size=8),
)
def test_read_vectors_fills_buffers_in_turn_up_to_the_end_of_the_file(fd, offset, sizes):
    buffers = [bytearray(size) for size in sizes]
    count, error = read_vectors(fd, offset, buffers, StopFlag())
    wanted = CONTENT[offset : offset + sum(sizes)]
    assert (count, error) == (len(wanted), 0)
    assert b"".join(buffers) == wanted + bytes(sum(sizes) - len(wanted))


@pytest.mark.parametrize("count", [255, 256, 257, 1000, 3000])
def test_read_vectors_takes_more_buffers_than_one_system_call_does(fd, count):
    buffers = [bytearray(7) for _ in range(count)]
    assert read_vectors(fd, 5, buffers, StopFlag()) == (7 * count, 0)
    assert b"".join(buffers) == CONTENT[5 : 5 + 7 * count]


def test_read_vectors_reads_nothing_once_it_was_told_to_stop(fd):
    stop = StopFlag()
    assert not stop.is_set()
    stop.set()
    assert stop.is_set()
    buffer = bytearray(10)
    assert read_vectors(fd, 0, [buffer], stop) == (0, 0)
    assert buffer == bytes(10)


def test_read_vectors_reports_the_errno(fd):
    assert read_vectors(-1, 0, [bytearray(1)], StopFlag()) == (0, errno.EBADF)
    assert read_vectors(fd, -1, [bytearray(1)], StopFlag()) == (0, errno.EINVAL)


def test_read_vectors_refuses_buffers_that_cannot_be_written_and_releases_the_others(fd):
    first = bytearray(10)
    for wrong in (b"read-only", "text", memoryview(bytearray(10))[::2]):
        with pytest.raises((BufferError, TypeError)):
            read_vectors(fd, 0, [first, wrong], StopFlag())
    first.append(1)  # not exported any more
    assert first[:10] == bytes(10)


def test_read_vectors_refuses_a_file_without_positions():
    read_end, write_end = os.pipe()
    try:
        assert read_vectors(read_end, 0, [bytearray(1)], StopFlag()) == (0, errno.ESPIPE)
    finally:
        os.close(read_end)
        os.close(write_end)
