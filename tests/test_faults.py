"""Hostile files, files that change under us, a process short of everything, and cancelled loads."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, ShardedStateLoader
from asyncshard.errors import (
    AccessDeniedError,
    BudgetError,
    FormatError,
    NotRegularFileError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedError,
)
from asyncshard.testing import GatedStore, MemoryStore

KIB, MIB = 1 << 10, 1 << 20


def run_child(code, *arguments, timeout=90):
    """Run Python code in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Hostile files


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def as_file(header, data=b"data", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = json.dumps({"w": entry()}).encode()
DEEP = b'{"__metadata__":{},"w":{"x":' + b"[" * 200 + b"]" * 200 + b"," + GOOD[7:-1] + b"}"

HOSTILE = {
    "an empty file": b"",
    "seven bytes": b"1234567",
    "a length without a header": (10).to_bytes(8, "little"),
    "a header over the limit": (100_000_001).to_bytes(8, "little") + b"{}",
    "a header as large as an address space": (2**64 - 1).to_bytes(8, "little") + b"{}",
    "a header past the end": as_file(GOOD, b"", length=len(GOOD) + 1),
    "no JSON": as_file(b"x" * 20),
    "an empty header": as_file(b"", b""),
    "an array": as_file([]),
    "a header that is not UTF-8": as_file(b'{"\xff\xfe": 1}'),
    "an overlong form": as_file(b'{"\xc0\x80": 1}'),
    "a lone surrogate": as_file(b'{"\\ud800": ' + GOOD[6:]),
    "a trailing comma": as_file(GOOD[:-1] + b",}"),
    "a comment": as_file(GOOD + b"//"),
    "two documents": as_file(GOOD + b"{}"),
    "a NUL after it": as_file(GOOD + b"\0"),
    "NaN": as_file({"w": entry(x=float("nan"))}),
    "a number out of range": as_file(GOOD[:-2] + b',"x":1e999}}'),
    "a leading zero": as_file(GOOD.replace(b"[4]", b"[04]")),
    "a raw control character": as_file(GOOD.replace(b'"w"', b'"\n"')),
    "nesting without end": as_file(DEEP),
    "a name twice": as_file(b'{"w":' + GOOD[6:-1] + b',"w":' + GOOD[6:]),
    "a field twice": as_file(GOOD[:-2] + b',"dtype":"U8"}}'),
    "a metadata key twice": as_file(b'{"__metadata__":{"a":"1","a":"2"},' + GOOD[1:]),
    "metadata that is null": as_file({"__metadata__": None, "w": entry()}),
    "metadata of a number": as_file({"__metadata__": {"a": 1}, "w": entry()}),
    "no dtype": as_file({"w": {"shape": [4], "data_offsets": [0, 4]}}),
    "no shape": as_file({"w": {"dtype": "U8", "data_offsets": [0, 4]}}),
    "no offsets": as_file({"w": {"dtype": "U8", "shape": [4]}}),
    "an entry that is an array": as_file({"w": ["U8", [4], [0, 4]]}),
    "an unknown dtype": as_file({"w": entry("F128", (1,))}),
    "a dtype in small letters": as_file({"w": entry("u8")}),
    "a dtype that is a number": as_file({"w": entry(8)}),
    "a negative dimension": as_file({"w": entry(shape=(-4,))}),
    "a dimension with a point": as_file({"w": entry(shape=(4.0,))}),
    "a dimension of 2**64": as_file({"w": entry(shape=(2**64,))}),
    "a product that overflows to the right size": as_file({"w": entry(shape=(2**62, 4, 4))}),
    "bits that overflow": as_file({"w": entry("F64", (2**61,), (0, 0))}, b""),
    "a size unlike the offsets": as_file({"w": entry(shape=(3,))}),
    "half a byte": as_file({"w": entry("F4", (7,))}),
    "one offset": as_file({"w": entry(offsets=(0,))}),
    "three offsets": as_file({"w": entry(offsets=(0, 4, 4))}),
    "an end before its beginning": as_file({"w": entry(offsets=(4, 0))}),
    "a negative offset": as_file({"w": entry(offsets=(-4, 0))}),
    "offsets past the end": as_file({"w": entry(shape=(400,), offsets=(0, 400))}),
    "a hole at the beginning": as_file({"w": entry(offsets=(4, 8))}, b"datadata"),
    "a hole between": as_file({"w": entry(), "v": entry(offsets=(8, 12))}, bytes(12)),
    "an overlap": as_file({"w": entry(), "v": entry(offsets=(2, 6))}, bytes(6)),
    "an alias": as_file({"w": entry(), "v": entry()}),
    "trailing bytes": as_file({"w": entry()}, b"data and more"),
    "a file cut by one byte": as_file({"w": entry()}, b"dat"),
    "data without tensors": as_file({}, b"data"),
}


def io_read():
    """Return the bytes that this process has read."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_file_is_a_format_error_that_names_it(kind, tmp_path, checkpoints):
    good = checkpoints.shard({"first": np.ones(4, np.uint8)})
    bad = tmp_path / "model-rank-0-part-1.safetensors"
    (tmp_path / "model-rank-0-part-0.safetensors").write_bytes(good)
    bad.write_bytes(HOSTILE[kind])
    state = {"first": np.zeros(4, np.uint8), "w": np.zeros(4, np.uint8)}
    loader = ShardedStateLoader()
    for load in (
        loader.load_weights(tmp_path, state, strict=False),
        loader.load_weights(tmp_path),
        AsyncShardLoader(loader).stream(tmp_path),
        asyncshard.read_header(bad),
    ):
        with pytest.raises(FormatError) as caught:
            await load
        assert caught.value.path == str(bad)
        assert str(bad) in str(caught.value)
    assert not state["first"].any()
    assert loader.budget.bytes_used == 0


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [("an unknown dtype", "w"), ("a size unlike the offsets", "w"), ("an overlap", "v"), ("a name twice", "w")],
)
async def test_the_error_names_the_tensor(kind, tensor, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(FormatError, match=repr(tensor)) as caught:
        await asyncshard.load(path)
    assert caught.value.tensor == tensor


async def test_a_hostile_shard_is_found_before_the_data_of_the_good_ones_is_read(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"big": np.zeros(4 * MIB, np.uint8)})
    (tmp_path / "model-rank-0-part-1.safetensors").write_bytes(HOSTILE["an overlap"])
    before = io_read()
    with pytest.raises(FormatError):
        await asyncshard.load(tmp_path)
    assert io_read() - before < MIB


async def test_a_huge_sparse_file_is_judged_by_its_header(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(as_file({"w": entry(shape=(2**42,), offsets=(0, 2**42))}, b""))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size + 2**42)
    assert (await asyncshard.read_header(path))["w"].nbytes == 2**42
    with pytest.raises(BudgetError, match="'w'"):
        await asyncshard.stream(path)


async def test_of_several_broken_shards_the_first_is_named(tmp_path):
    for part in range(10):
        (tmp_path / f"model-rank-0-part-{part}.safetensors").write_bytes(b"broken")
    with pytest.raises(FormatError, match="part-0"):
        await asyncshard.load(tmp_path)


# What is no regular file

NAME = "model-rank-0-part-0.safetensors"


@pytest.mark.parametrize("name", [NAME, "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "socket", "dangling link", "looping link", "link to a device"])
async def test_what_is_no_regular_file_is_an_error_at_once(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = tmp_path / name
    expected = NotRegularFileError
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "dangling link":
        path.symlink_to("nothing")
        expected = ObjectNotFoundError
    elif kind == "looping link":
        path.symlink_to(name)
        expected = StoreError
    else:
        path.symlink_to("/dev/zero")
        expected = AccessDeniedError
    for load in (
        asyncshard.load(tmp_path),
        asyncshard.stream(tmp_path),
        ShardedStateLoader().load_weights(tmp_path, {}),
    ):
        with pytest.raises(expected) as caught:
            await load
        assert str(path) in str(caught.value)
    if kind == "link to a device":
        with pytest.raises(NotRegularFileError):
            await asyncshard.load(tmp_path, storage_options={"allow_symlinks": True})


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/proc/self"])
async def test_a_device_that_the_user_names_is_refused(path):
    with pytest.raises((NotRegularFileError, ObjectNotFoundError)):
        await asyncshard.load(path)
    with pytest.raises(NotRegularFileError):
        await asyncshard.read_header(path)


async def test_a_file_of_proc_without_a_size_is_refused():
    with pytest.raises(FormatError):
        await asyncshard.load("/proc/self/maps")


# Files that change while they are read


@pytest.fixture
def changing(tmp_path, checkpoints):
    """A file of 32 tensors of 64 KiB, and what is read of it through a stream that is one item ahead."""
    tensors = {f"t{i:02}": np.full(64 * KIB, i, np.uint8) for i in range(32)}
    return checkpoints.write_file(tmp_path / "x.safetensors", tensors), tensors


def truncate(path):
    os.truncate(path, path.stat().st_size - 64 * KIB)


def shrink_to_nothing(path):
    os.truncate(path, 0)


def grow(path):
    with path.open("ab") as file:
        file.write(b"more")


def replace(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[: -64 * KIB] + b"\xff" * 64 * KIB)
    os.replace(other, path)


def rewrite_in_place(path):
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\xff" * 100)


def remove(path):
    path.unlink()


CHANGES = [truncate, shrink_to_nothing, grow, replace, rewrite_in_place, remove]


@pytest.mark.parametrize("is_in_place", [False, True])
@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_changes_while_it_streams_is_an_error_never_a_mix(change, is_in_place, changing):
    path, tensors = changing
    into = {name: np.full(64 * KIB, 255, np.uint8) for name in tensors} if is_in_place else None
    loader = AsyncShardLoader(prefetch_count=1, chunk_size=64 * KIB)
    delivered = {}

    async def consume():
        async with loader.stream(path, into) as stream:
            async for name, tensor in stream:
                delivered[name] = tensor
                if len(delivered) == 3:
                    change(path)

    with pytest.raises((ObjectChangedError, TruncatedError, ObjectNotFoundError)) as caught:
        await consume()
    assert str(path) in str(caught.value)
    assert 3 <= len(delivered) < 32
    for name, tensor in delivered.items():
        assert tensor.tobytes() == tensors[name].tobytes()
    if is_in_place:
        assert set(delivered) <= set(caught.value.filled)
        for name in caught.value.filled:
            assert into[name].tobytes() == tensors[name].tobytes()
        for name in set(tensors) - set(caught.value.filled) - set(caught.value.torn):
            assert (into[name] == 255).all()


@pytest.mark.parametrize("change", CHANGES)
async def test_a_file_that_changes_between_opening_and_reading_is_an_error(change, changing):
    path, _ = changing
    stream = await asyncshard.stream(path)
    change(path)
    with pytest.raises((ObjectChangedError, TruncatedError, ObjectNotFoundError), match=r"x\.safetensors"):
        await anext(stream)
    await stream.aclose()


async def test_a_shard_that_is_replaced_before_its_turn_is_an_error(tmp_path, checkpoints):
    parts = [{f"t{part}": np.full(64 * KIB, part, np.uint8)} for part in range(20)]
    checkpoints.write_ranks(tmp_path, *parts)
    last = tmp_path / "model-rank-0-part-19.safetensors"
    names = []

    async def consume():
        async with AsyncShardLoader(prefetch_count=1).stream(tmp_path) as stream:
            async for name, _ in stream:
                if not names:
                    checkpoints.write_file(tmp_path / "other", {"t19": np.full(64 * KIB, 77, np.uint8)})
                    os.replace(tmp_path / "other", last)
                names.append(name)

    with pytest.raises(ObjectChangedError, match="part-19"):
        await consume()
    assert names == [f"t{part}" for part in range(19)]


async def test_a_load_after_a_change_is_right(changing):
    path, tensors = changing
    stream = await asyncshard.stream(path)
    rewrite_in_place(path)
    with pytest.raises(ObjectChangedError):
        await stream.drain()
    got = await asyncshard.load(path)
    assert got["t31"][-1] == 255
    assert got["t30"].tobytes() == tensors["t30"].tobytes()


# A process short of everything


async def test_a_default_executor_full_of_sleeping_jobs_does_not_matter(tmp_path, checkpoints):
    weights = checkpoints.tensors(5)
    for write in (checkpoints.write_ranks, checkpoints.write_hugging_face):
        write(tmp_path / write.__name__, weights)
    wake = threading.Event()
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(4))
    jobs = [loop.run_in_executor(None, wake.wait) for _ in range(64)]
    try:
        for write in (checkpoints.write_ranks, checkpoints.write_hugging_face):
            path = tmp_path / write.__name__
            assert checkpoints.same(await asyncshard.load(path), weights)
            assert checkpoints.same({name: tensor async for name, tensor in asyncshard.stream(path)}, weights)
        await asyncshard.save_sharded_state(weights, tmp_path / "new", rank=0)
        assert not any(job.done() for job in jobs)
    finally:
        wake.set()
        await asyncio.gather(*jobs)


FEW_FILES = """
import asyncio, os, resource, sys
import asyncshard

async def main(path):
    await asyncshard.load(path)  # what is imported and opened once
    used = len(os.listdir("/proc/self/fd")) - 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, used + 10))
    names = [name async for name, _ in asyncshard.stream(path)]
    assert len(names) == len(await asyncshard.load(path)) == 60, len(names)
    kept = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
    for _ in range(3):
        try:
            await asyncshard.load(path)
        except asyncshard.errors.StoreError as error:
            assert "ulimit -n" in str(error) and path in str(error), error
            assert error.errno == 24
        else:
            raise AssertionError("it loaded")
    for fd in kept:
        os.close(fd)
    assert len(await asyncshard.load(path)) == 60
    print("done")

asyncio.run(main(sys.argv[1]))
"""


def test_few_file_descriptors_are_enough_and_none_are_an_error_that_says_so(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, *({f"t{part}": np.zeros(10)} for part in range(60)))
    assert run_child(FEW_FILES, tmp_path) == "done"


LITTLE_SPACE = """
import asyncio, resource, sys
import asyncshard
async def main(path):
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    assert len(await asyncshard.load(path, memory_budget_mb=64)) == 3
    try:
        await asyncshard.stream(path, memory_budget_mb=100_000).drain()
    except asyncshard.errors.BudgetError as error:
        assert "ulimit -v" in str(error), error
    assert len(await asyncshard.load(path, memory_budget_mb=64)) == 3
    print("done")
asyncio.run(main(sys.argv[1]))
"""


def test_little_address_space_is_an_error_that_says_so(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, checkpoints.tensors(3))
    assert run_child(LITTLE_SPACE, tmp_path) == "done"


async def test_a_hundred_thousand_tensors(tmp_path, checkpoints):
    count = 100_000
    header = {f"layer.{i}.weight": entry("I32", (), (4 * i, 4 * i + 4)) for i in range(count)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(as_file(header, np.arange(count, dtype="<i4").tobytes()))
    got = await asyncshard.load(path)
    assert len(got) == count
    assert list(got)[::9999] == [f"layer.{i}.weight" for i in range(0, count, 9999)]
    assert all(int(got[f"layer.{i}.weight"]) == i for i in range(0, count, 997))
    number = 0
    async for _, tensor in asyncshard.stream(path, memory_budget_mb=32):
        assert int(tensor) == number
        number += 1
    assert number == count
    with pytest.raises(BudgetError, match="headers"):
        await asyncshard.stream(path, memory_budget_mb=1)


async def test_a_budget_of_one_megabyte_loads_many_times_as_much(tmp_path, checkpoints):
    weights = {f"t{i:03}": np.full(100_000 + i, i % 256, np.uint8) for i in range(200)}
    checkpoints.write_ranks(tmp_path, weights)
    loader = AsyncShardLoader(memory_budget_mb=1)
    count = 0
    async for name, tensor in loader.stream(tmp_path):
        assert tensor.tobytes() == weights[name].tobytes()
        count += 1
        assert loader.budget.bytes_used <= MIB
    assert count == 200


async def test_ten_loaders_at_once(tmp_path, checkpoints):
    weights = {f"t{i:02}": np.full(50_000, i, np.int32) for i in range(40)}
    checkpoints.write_ranks(tmp_path, weights)

    async def load(number):
        loader = AsyncShardLoader(memory_budget_mb=1, chunk_size=64 * KIB, prefetch_count=1 + number)
        if number % 3 == 0:
            return await loader.load_weights_async(tmp_path)
        if number % 3 == 1:
            return {name: tensor.copy() async for name, tensor in loader.stream(tmp_path)}
        state = {name: np.zeros_like(array) for name, array in weights.items()}
        await loader.stream(tmp_path, state).drain()
        return state

    for got in await asyncio.gather(*map(load, range(10))):
        assert checkpoints.same(got, weights)


# Cancelled loads into the caller's memory


@pytest.mark.parametrize("times", [1, 2])
async def test_nothing_is_written_after_a_cancelled_load_has_returned(times, tmp_path, checkpoints):
    weights = {f"t{i}": np.full(4 * MIB, i + 1, np.uint8) for i in range(12)}
    checkpoints.write_ranks(tmp_path, weights)
    memory = np.zeros(12 * 4 * MIB, np.uint8)
    state = {f"t{i}": memory[i * 4 * MIB : (i + 1) * 4 * MIB] for i in range(12)}
    loader = ShardedStateLoader(chunk_size=MIB)
    task = asyncio.create_task(loader.load_weights(tmp_path, state))
    while not memory[0] and not task.done():  # noqa: ASYNC110 - the first byte has come
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    after = memory.copy()
    memory[:] = 200
    await loader.load_weights(tmp_path, {name: np.zeros(4 * MIB, np.uint8) for name in weights})
    assert (memory == 200).all()
    filled, torn = set(caught.value.filled), set(caught.value.torn)
    assert not filled & torn
    for i in range(12):
        part = after[i * 4 * MIB : (i + 1) * 4 * MIB]
        assert np.isin(part[:: 1 << 12], (0, i + 1)).all()
        if f"t{i}" in filled:
            assert (part == i + 1).all()
        elif f"t{i}" not in torn:
            assert not part.any()


async def test_a_cancelled_load_waits_for_reads_that_cannot_be_stopped(checkpoints):
    weights = {f"t{i}": np.full(64 * KIB, i + 1, np.uint8) for i in range(4)}
    store = GatedStore(MemoryStore(checkpoints.rank_files(weights)), is_stubborn=True)
    state = {name: np.zeros(64 * KIB, np.uint8) for name in weights}
    task = asyncio.create_task(ShardedStateLoader(chunk_size=64 * KIB).load_weights(store, state))
    await store.waiting(4)
    for _ in range(20):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    store.open_all()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.gates == []


async def test_a_load_that_timed_out_can_be_made_again(tmp_path, checkpoints):
    weights = {f"t{i}": np.full(64 * KIB, i + 1, np.uint8) for i in range(4)}
    store = GatedStore(MemoryStore(checkpoints.rank_files(weights)))
    state = {name: np.zeros(64 * KIB, np.uint8) for name in weights}
    loader = ShardedStateLoader()

    async def load():
        async with asyncio.timeout(None) as deadline:
            asyncio.get_running_loop().call_soon(deadline.reschedule, 0)
            await loader.load_weights(store, state)

    with pytest.raises(TimeoutError):
        await load()
    store.open_all()
    await loader.load_weights(store, state)
    assert checkpoints.same(state, weights)


async def test_the_failure_of_a_sibling_ends_a_load_and_comes_out(tmp_path, checkpoints):
    store = GatedStore(MemoryStore(checkpoints.rank_files({"w": np.ones(10)})))

    async def fail():
        await store.waiting(1)
        raise ZeroDivisionError

    async def both():
        async with asyncio.TaskGroup() as group:
            group.create_task(ShardedStateLoader().load_weights(store, {"w": np.zeros(10)}))
            group.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await both()
    assert [type(error) for error in caught.value.exceptions] == [ZeroDivisionError]
    assert store.gates == []
