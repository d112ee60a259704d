"""One directory, several real processes: they share what they fetch, and survive each other's deaths."""

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import asyncshard
from asyncshard.testing import S3Server

MIB = 1 << 20
NBYTES = 20 * MIB + 4321
COUNT = 8

CHILD = """
import asyncio, os, random, signal, sys

directory, nbytes, step, kill_at = sys.argv[1], *map(int, sys.argv[2:5])
from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.testing import MemoryStore

fetched, calls = 0, 0

class Origin(MemoryStore):
    async def read_into(self, meta, start, buffers):
        global fetched
        buffers = list(buffers)
        fetched += sum(buffer.nbytes for buffer in buffers)
        if kill_at < 0:  # stop for ever, with the locks held
            os.kill(os.getpid(), signal.SIGSTOP)
        await super().read_into(meta, start, buffers)

def deadly(name):
    call = getattr(os, name)
    def wrapped(*args, **more):
        global calls
        calls += 1
        if kill_at == calls:
            if name == "pwrite" and len(args[1]) > 16:  # a digest is written whole or not at all
                call(args[0], args[1][: len(args[1]) // 2], args[2])
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **more)
    setattr(os, name, wrapped)

if kill_at > 0:
    for name in ("pwrite", "link", "ftruncate", "unlink", "preadv", "pread"):
        deadly(name)

async def main():
    data = random.Random(0).randbytes(nbytes)
    sys.stdin.readline()
    async with CachedStore(Origin({"a": data}), DiskCache(directory, max_bytes=1 << 30)) as store:
        meta, _ = await store.open("a", 0)
        memory = memoryview(bytearray(nbytes))
        await asyncio.gather(
            *(store.read_into(meta, start, [memory[start : start + step]]) for start in range(0, nbytes, step))
        )
        assert memory == data
    print(fetched)

asyncio.run(main())
"""


class Children:
    """Processes that load the same object, once they are told to."""

    def __init__(self, directory):
        self._directory = directory
        self._environment = {**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])}
        self.processes = []

    def start(self, *, step=3 * MIB, kill_at=0):
        arguments = [self._directory, NBYTES, step, kill_at]
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment,
        )
        self.processes.append(process)
        return process

    def run(self, process):
        """Let one go on to its end; return the bytes that it fetched."""
        out, error = process.communicate("\n", timeout=60)
        assert error == ""
        return int(out)


@pytest.fixture
def children(tmp_path):
    made = Children(tmp_path / "cache")
    yield made
    for process in made.processes:
        process.kill()
        process.communicate()


@pytest.fixture
def content():
    return random.Random(0).randbytes(NBYTES)


async def test_eight_processes_that_start_together_fetch_each_block_once(children):
    processes = [children.start(step=step * MIB + 11) for step in (3, 3, 3, 3, 1, 5, 8, 30)]
    assert len(processes) == COUNT
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    fetched = [children.run(process) for process in processes]
    assert sum(fetched) == NBYTES
    assert children.run(children.start()) == 0


EARLY = [range(number, number + 1) for number in range(1, 8)]
LATER = [range(8, 14), range(14, 20), range(20, 26), range(26, 32), range(32, 40)]


@pytest.mark.parametrize("moments", [*EARLY, *LATER], ids=lambda moments: f"{moments[0]}-{moments[-1]}")
def test_a_process_that_is_killed_leaves_no_block_that_is_wrong(moments, children):
    kill_at = random.SystemRandom().choice(moments)
    process = children.start(kill_at=kill_at)
    process.communicate("\n", timeout=60)
    assert process.returncode == -signal.SIGKILL, kill_at
    assert children.run(children.start()) <= NBYTES, kill_at
    assert children.run(children.start()) == 0, kill_at


async def test_the_locks_of_a_process_that_is_killed_are_free(children, make_cache, origin, load, content, warnings_of):
    process = children.start(kill_at=-1)
    process.stdin.write("\n")
    process.stdin.flush()
    _, status = await asyncio.to_thread(os.waitpid, process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    waiting = asyncio.ensure_future(load(store=origin(content=content), step=NBYTES))
    await asyncio.to_thread(process.kill)
    result, store = await waiting
    assert result == content
    assert store.nbytes == NBYTES
    assert warnings_of() == []


async def test_a_process_that_is_stopped_holds_nobody_for_long(
    children, make_cache, origin, load, content, warnings_of
):
    process = children.start(kill_at=-1)
    process.stdin.write("\n")
    process.stdin.flush()
    await asyncio.to_thread(os.waitpid, process.pid, os.WUNTRACED)
    result, _ = await load(make_cache(lock_timeout_s=0.1), origin(content=content))
    assert result == content
    (warning,) = warnings_of()
    assert "another process" in warning


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
sys.argv[0:] = ["", *sys.argv[1:]]
exec(sys.stdin.readline().encode().decode("unicode_escape"))
"""


def test_files_that_may_not_grow_leave_the_load_as_it_is(children, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "cache"), str(NBYTES), str(MIB), "0"],
        input=CHILD.encode("unicode_escape").decode() + "\n\n",
        capture_output=True,
        text=True,
        timeout=60,
        env=children._environment,
        check=False,
    )
    assert int(process.stdout) >= NBYTES
    assert "the load goes on without the cache" in process.stderr


S3_CHILD = """
import asyncio, sys
import asyncshard

async def main():
    sys.stdin.readline()
    weights = await asyncshard.load(
        "s3://models/m",
        cache_dir=sys.argv[1],
        storage_options={"endpoint_url": sys.argv[2], "unsigned": True, "region_name": "us-east-1"},
    )
    print(sum(int(array[0]) for array in weights.values()))

asyncio.run(main())
"""


async def test_processes_that_load_from_s3_share_one_copy(tmp_path, checkpoints):
    tensors = checkpoints.tensors(24, nbytes=2 * MIB)
    files = checkpoints.hugging_face_files(tensors)
    size = sum(map(len, files.values()))
    environment = {**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])}

    async def run(url):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", S3_CHILD, str(tmp_path / "cache"), url, stdin=-1, stdout=-1, env=environment
        )
        out, _ = await process.communicate(b"\n")
        return int(out)

    async with S3Server() as server:
        for name, data in files.items():
            server.put("models", f"m/{name}", data)
        expected = sum(int(array[0]) for array in tensors.values())
        assert await asyncio.gather(*(run(server.endpoint_url) for _ in range(4))) == [expected] * 4
        # The first bytes of a file and the index are asked for by each.
        assert server.bytes_sent <= size + 4 * (1 * MIB)
        sent = server.bytes_sent
        assert await run(server.endpoint_url) == expected
        assert server.bytes_sent - sent <= MIB
