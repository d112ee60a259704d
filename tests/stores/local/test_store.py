import asyncio
import ctypes
import errno
import mmap
import os
import resource
import socket

import numpy as np
import pytest

import asyncshard
from asyncshard.errors import (
    AccessDeniedError,
    NotRegularFileError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedError,
)
from asyncshard.stores import LocalStore
from asyncshard.stores.local import store as local
from asyncshard.testing import StoreTests

DATA = np.random.default_rng(0).bytes(300_000)


class TestLocalStore(StoreTests):
    @pytest.fixture(autouse=True)
    def _in_a_directory(self, tmp_path):
        self.directory = tmp_path

    async def make_store(self, files):
        for name, data in files.items():
            (self.directory / name).write_bytes(data)
        return LocalStore(str(self.directory))

    async def replace(self, store, name, data):
        (self.directory / "new").write_bytes(data)
        os.replace(self.directory / "new", self.directory / name)

    async def remove(self, store, name):
        (self.directory / name).unlink()


@pytest.fixture
async def directory(tmp_path):
    (tmp_path / "a.bin").write_bytes(DATA)
    return tmp_path


async def read(store, meta, start=0, nbytes=None):
    memory = bytearray(meta.size - start if nbytes is None else nbytes)
    await store.read_into(meta, start, [memoryview(memory)])
    return memory


# --- what stands there


async def test_the_root_may_be_one_file(directory):
    async with LocalStore(str(directory / "a.bin")) as store:
        listing = await store.list()
        assert (listing.names, listing.is_file) == (("a.bin",), True)
        assert await store.read("a.bin") == DATA
        assert store.path_of("a.bin") == str(directory / "a.bin")


async def test_the_root_may_be_a_symbolic_link_to_anywhere(directory, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "directory").symlink_to(directory)
    (other / "file.bin").symlink_to(directory / "a.bin")
    async with LocalStore(str(other / "directory")) as store:
        assert await store.read("a.bin") == DATA
    async with LocalStore(str(other / "file.bin")) as store:
        (name,) = (await store.list()).names
        meta, _ = await store.open(name, 10)
        assert await read(store, meta) == DATA


async def test_a_root_that_is_not_there_is_an_error(tmp_path):
    for path in (tmp_path / "absent", tmp_path / "absent" / "deeper"):
        async with LocalStore(str(path)) as store:
            with pytest.raises(ObjectNotFoundError, match="no such file") as caught:
                await store.list()
            assert caught.value.path == str(path)
            assert caught.value.errno == errno.ENOENT


async def test_a_file_used_as_a_directory_is_an_error(directory):
    async with LocalStore(str(directory / "a.bin" / "deeper")) as store:
        with pytest.raises(ObjectNotFoundError):
            await store.list()


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def _directory(path):
    path.mkdir()


def _device(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "what"), [(_fifo, "FIFO"), (_socket, "socket"), (_directory, "directory"), (_device, "device")]
)
async def test_what_is_no_regular_file_is_an_error_at_once(tmp_path, make, what):
    make(tmp_path / "odd.bin")
    async with LocalStore(str(tmp_path), allow_symlinks=True) as store:
        for call in (store.open("odd.bin", 8), store.read("odd.bin")):
            with pytest.raises(NotRegularFileError, match=what) as caught:
                await call
            assert caught.value.path == str(tmp_path / "odd.bin")


async def test_a_root_that_is_a_fifo_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    async with LocalStore(str(tmp_path / "fifo")) as store:
        with pytest.raises(NotRegularFileError, match="FIFO"):
            await store.list()


async def test_a_dangling_link_is_an_error_that_says_so(tmp_path):
    (tmp_path / "link.bin").symlink_to(tmp_path / "gone.bin")
    async with LocalStore(str(tmp_path)) as store:
        with pytest.raises(ObjectNotFoundError, match="points to nothing"):
            await store.open("link.bin", 8)


async def test_links_in_a_loop_are_an_error(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    async with LocalStore(str(tmp_path)) as store:
        with pytest.raises(StoreError, match="one"):
            await store.open("one", 8)
    async with LocalStore(str(tmp_path / "one")) as store:
        with pytest.raises(StoreError, match="loop"):
            await store.list()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_a_file_that_may_not_be_read_is_an_error(directory):
    (directory / "a.bin").chmod(0)
    async with LocalStore(str(directory)) as store:
        with pytest.raises(AccessDeniedError, match="permission denied"):
            await store.open("a.bin", 8)


# --- confinement


@pytest.fixture
def outside(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "secret.bin"
    path.write_bytes(b"secret")
    return path


async def test_a_name_that_leads_out_of_the_root_is_refused(directory, outside):
    (directory / "link.bin").symlink_to(outside)
    (directory / "folder").symlink_to(outside.parent)
    (directory.parent / (directory.name + "-beside")).mkdir()
    (directory.parent / (directory.name + "-beside") / "b.bin").write_bytes(b"beside")
    names = [
        "link.bin",
        "folder/secret.bin",
        str(outside),
        f"../{directory.name}-beside/b.bin",
        f"../../{outside.parent.name}/secret.bin",
    ]
    async with LocalStore(str(directory)) as store:
        for name in names:
            for call in (store.open(name, 8), store.read(name)):
                with pytest.raises(AccessDeniedError, match="outside"):
                    await call
    async with LocalStore(str(directory), allow_symlinks=True) as store:
        assert await store.read("link.bin") == b"secret"


async def test_links_within_the_root_are_followed(directory):
    (directory / "folder").mkdir()
    (directory / "link.bin").symlink_to("a.bin")
    (directory / "folder" / "link.bin").symlink_to("../a.bin")
    async with LocalStore(str(directory)) as store:
        assert await store.read("link.bin") == await store.read("folder/link.bin") == DATA


async def test_a_hugging_face_cache_may_link_to_its_blobs_and_nothing_else(tmp_path, outside):
    model = tmp_path / "models--org--name"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "blobs" / "beef").write_bytes(DATA)
    (model / "refs" / "main").write_bytes(b"0123abcd")
    (snapshot / "model.bin").symlink_to("../../blobs/beef")
    (snapshot / "refs.bin").symlink_to("../../refs/main")
    (snapshot / "outside.bin").symlink_to(outside)
    (model / "blobs" / "hop").symlink_to(outside)
    (snapshot / "hop.bin").symlink_to("../../blobs/hop")
    async with LocalStore(str(snapshot)) as store:
        assert await store.read("model.bin") == DATA
        for name in ("refs.bin", "outside.bin", "hop.bin"):
            with pytest.raises(AccessDeniedError):
                await store.open(name, 8)


# --- files that change


def _truncate(path):
    os.truncate(path, 1000)


def _extend(path):
    with path.open("ab") as file:
        file.write(b"more")


def _rename_over(path):
    other = path.with_name("other")
    other.write_bytes(bytes(len(DATA)))
    other.replace(path)


def _rewrite_in_place(path):
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p leave it


def _remove(path):
    path.unlink()


def _remove_and_write(path):
    path.unlink()
    path.write_bytes(DATA)


CHANGES = [_truncate, _extend, _rename_over, _rewrite_in_place, _remove, _remove_and_write]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("is_still_open", [True, False])
async def test_a_file_that_changes_between_open_and_read_is_an_error(directory, change, is_still_open):
    path = directory / "a.bin"
    for number in range(20):
        (directory / f"{number}.bin").write_bytes(b"x")
    async with LocalStore(str(directory)) as store:
        meta, _ = await store.open("a.bin", 16)
        if not is_still_open:
            for number in range(20):
                await store.open(f"{number}.bin", 1)
        change(path)
        with pytest.raises((ObjectChangedError, ObjectNotFoundError)) as caught:
            await read(store, meta)
        assert caught.value.path == str(path)


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not _truncate])
async def test_a_file_that_changes_during_a_read_is_an_error(directory, change, monkeypatch):
    def read_vectors(*arguments):
        result = local_read_vectors(*arguments)
        change(directory / "a.bin")
        return result

    async with LocalStore(str(directory)) as store:
        meta, _ = await store.open("a.bin", 16)
        local_read_vectors = local.read_vectors
        monkeypatch.setattr(local, "read_vectors", read_vectors)
        with pytest.raises(ObjectChangedError):
            await read(store, meta)


async def test_a_file_that_is_truncated_during_a_read_is_an_error_with_the_offset(directory, monkeypatch):
    def read_vectors(*arguments):
        _truncate(directory / "a.bin")
        return local_read_vectors(*arguments)

    async with LocalStore(str(directory)) as store:
        meta, _ = await store.open("a.bin", 16)
        local_read_vectors = local.read_vectors
        monkeypatch.setattr(local, "read_vectors", read_vectors)
        with pytest.raises(TruncatedError, match="ends at byte 1,000") as caught:
            await read(store, meta, 500)
        assert (caught.value.start, caught.value.stop) == (500, len(DATA))


async def test_a_disk_error_names_the_file_and_the_offset(directory, monkeypatch):
    monkeypatch.setattr(local, "read_vectors", lambda fd, offset, buffers, stop: (4096, errno.EIO))
    async with LocalStore(str(directory)) as store:
        with pytest.raises(StoreError) as caught:
            await store.open("a.bin", 8192)
    assert caught.value.errno == errno.EIO
    assert str(directory / "a.bin") in str(caught.value)
    assert "4,096" in str(caught.value)
    assert (caught.value.start, caught.value.stop) == (4096, 8192)


async def test_ranges_of_a_file_that_ends_or_fails_tell_which(directory, monkeypatch):
    offsets, lengths = np.array([10, 1000, 290_000]), np.array([10, 20, 20_000])
    async with LocalStore(str(directory)) as store:
        meta, _ = await store.open("a.bin", 16)
        memory = [memoryview(bytearray(20_030))]
        with pytest.raises(TruncatedError, match="ends at byte 300,000, 10,000 bytes before") as caught:
            await store.read_ranges(meta, offsets, lengths, memory)
        assert (caught.value.start, caught.value.stop) == (290_000, 310_000)
        monkeypatch.setattr(local, "read_ranges", lambda *arguments: (12, errno.EIO))
        with pytest.raises(StoreError) as caught:
            await store.read_ranges(meta, offsets, lengths, memory)
    assert caught.value.errno == errno.EIO
    assert (caught.value.start, caught.value.stop) == (1002, 1020)


@pytest.mark.parametrize("change", [change for change in CHANGES if change is not _truncate])
async def test_ranges_of_a_file_that_is_changed_are_an_error(directory, change):
    async with LocalStore(str(directory)) as store:
        meta, _ = await store.open("a.bin", 16)
        change(directory / "a.bin")
        with pytest.raises((ObjectChangedError, ObjectNotFoundError)):
            await store.read_ranges(meta, np.array([0, 50]), np.array([5, 5]), [memoryview(bytearray(10))])


async def test_the_gap_that_is_read_over_is_an_option(directory, monkeypatch):
    gaps = []
    read_ranges = local.read_ranges

    def watched(fd, offsets, lengths, buffers, max_gap, stop):
        gaps.append(max_gap)
        return read_ranges(fd, offsets, lengths, buffers, max_gap, stop)

    monkeypatch.setattr(local, "read_ranges", watched)
    for store, given in ((LocalStore(str(directory)), None), (LocalStore(str(directory), max_gap_bytes=77), None)):
        async with store:
            meta, _ = await store.open("a.bin", 16)
            await store.read_ranges(meta, np.array([0]), np.array([5]), [memoryview(bytearray(5))], max_gap=given)
    assert gaps == [local.DEFAULT_MAX_GAP_BYTES, 77]
    with pytest.raises(ValueError, match="max_gap_bytes must be 0 or more"):
        LocalStore(str(directory), max_gap_bytes=-1)


# --- page cache and descriptors


def resident_pages(path):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    count = -(-size // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * count)()
    with path.open("rb") as file:
        address = libc.mmap(
            None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0)
        )
        try:
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), states):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(state & 1 for state in states)


@pytest.mark.parametrize("page_cache", ["keep", "drop"])
async def test_page_cache_decides_whether_the_kernel_is_told_to_forget(directory, page_cache, monkeypatch):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *what: advised.append(what))
    async with LocalStore(str(directory), page_cache=page_cache) as store:
        meta, _ = await store.open("a.bin", 16)
        assert await read(store, meta, 4096, 8192) == DATA[4096:12288]
        await store.read_ranges(meta, np.array([5, 50]), np.array([5, 5]), [memoryview(bytearray(10))])
    expected = [(4096, 8192, os.POSIX_FADV_DONTNEED), (5, 50, os.POSIX_FADV_DONTNEED)]
    assert advised == (expected if page_cache == "drop" else [])


async def test_dropped_pages_leave_the_page_cache(tmp_path):
    path = tmp_path / "a.bin"
    with path.open("wb") as file:
        file.write(DATA)
        file.flush()
        os.fsync(file.fileno())  # dirty pages cannot be dropped
    async with LocalStore(str(tmp_path), page_cache="drop") as store:
        meta, _ = await store.open("a.bin", 16)
        await read(store, meta)
        if resident_pages(path):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if resident_pages(path):
                pytest.skip("this file system does not drop pages")
        assert resident_pages(path) == 0


def descriptors_below(directory):
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return sum(link.startswith(str(directory)) for link in links)


async def test_a_checkpoint_of_300_shards_never_has_more_than_a_few_files_open(tmp_path, checkpoints):
    shards = [checkpoints.tensors(1, nbytes=64, prefix=f"shard.{number}") for number in range(300)]
    checkpoints.write_ranks(tmp_path, *shards)
    most = 0
    async with asyncshard.stream(tmp_path) as stream:
        most = max(most, descriptors_below(tmp_path))
        count = 0
        async for _ in stream:
            most = max(most, descriptors_below(tmp_path))
            count += 1
    assert count == 300
    assert 0 < most <= 16
    assert descriptors_below(tmp_path) == 0


async def test_running_out_of_descriptors_is_an_error_that_names_the_file_and_the_remedy(directory):
    (directory / "b.bin").write_bytes(b"b")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with LocalStore(str(directory)) as store:
        await store.open("a.bin", 8)  # its thread runs
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StoreError, match="ulimit") as caught:
                await store.open("b.bin", 8)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert caught.value.errno == errno.EMFILE
        assert caught.value.path == str(directory / "b.bin")
        assert await store.read("b.bin") == b"b"


async def test_a_cancelled_close_still_closes(directory):
    for turns in range(3):
        store = LocalStore(str(directory))
        await store.open("a.bin", 8)
        closing = asyncio.ensure_future(store.aclose())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        await store.aclose()
        assert descriptors_below(directory) == 0


async def test_an_empty_file_can_be_opened_and_read(tmp_path):
    (tmp_path / "empty.bin").write_bytes(b"")
    async with LocalStore(str(tmp_path)) as store:
        meta, head = await store.open("empty.bin", 100)
        assert (meta.size, head) == (0, b"")
        await store.read_into(meta, 0, [memoryview(bytearray())])
        with pytest.raises(TruncatedError):
            await read(store, meta, 0, 1)


async def test_names_may_hold_spaces_and_any_script(tmp_path):
    for name in ("with space.bin", "重み.bin", "new\nline.bin", "%41.bin"):
        (tmp_path / name).write_bytes(name.encode())
    async with LocalStore(str(tmp_path)) as store:
        for name in (await store.list()).names:
            assert await store.read(name) == name.encode()


async def test_reads_in_flight_are_at_most_max_workers(directory, monkeypatch):
    running, most = [], []

    def read_vectors(*arguments):
        running.append(1)
        most.append(len(running))
        result = local_read_vectors(*arguments)
        running.pop()
        return result

    local_read_vectors = local.read_vectors
    monkeypatch.setattr(local, "read_vectors", read_vectors)
    async with LocalStore(str(directory), max_workers=1) as store:
        meta, _ = await store.open("a.bin", 0)
        await asyncio.gather(*(read(store, meta, 10 * number, 10) for number in range(50)))
    assert max(most) == 1
    assert len(most) == 51


async def test_the_page_cache_option_is_checked():
    with pytest.raises(ValueError, match="page_cache"):
        LocalStore("/", page_cache="forget")
