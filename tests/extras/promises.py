"""What each extra promises, as a small program that does it. An extra joins by its line in `PROMISES`.

It raises ImportError, with the sentence that the user gets, where the extra's packages are not installed. Nothing but
what the bare package brings is imported at the top.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import re
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

import asyncshard
from asyncshard.stores import from_url
from asyncshard.testing import MemoryStore, S3Server

EXAMPLES = Path(__file__).parents[2] / "examples"
TENSORS = {name: np.arange(size, dtype=np.float32).reshape(-1, 8) for name, size in (("a", 4096), ("b", 64))}
FILE = save(TENSORS)
NAME = "model.safetensors"
URL = "s3://models/m"


async def bare() -> None:
    """Stream, load in place, save and reshard on the local disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / NAME).write_bytes(FILE)
        async with asyncshard.stream(folder / NAME, memory_budget_mb=16) as weights:
            _require_same({name: tensor.copy() async for name, tensor in weights})
        state = {name: np.zeros_like(tensor) for name, tensor in TENSORS.items()}
        await asyncshard.ShardedStateLoader().load_weights(folder / NAME, state)
        _require_same(state)
        await asyncshard.save_sharded_state(state, folder / "saved", rank=0)
        plan = {"a": "colwise", "b": "rowwise"}
        await asyncshard.reshard(folder / "saved", folder / "ranks", world_size=2, tp_plan=plan)
        await asyncshard.reshard(folder / "ranks", folder / "again", world_size=1)
        _require_same(await asyncshard.load(folder / "again"))


async def s3() -> None:
    """List, stream and load from S3, by either transport."""
    for transport in ("sockets", "aiobotocore"):
        async with _served(transport=transport) as options, from_url(URL, **options) as store:
            assert (await store.list()).names == (NAME,)
            async with asyncshard.stream(store) as weights:
                _require_same({name: tensor.copy() async for name, tensor in weights})
            _require_same(await asyncshard.load(URL, storage_options=options))


async def checksums() -> None:
    """Compare what was read from S3 with the checksum of its object."""
    checksum = base64.b64encode(zlib.crc32(FILE).to_bytes(4, "big")).decode()
    async with (
        _served(headers={"x-amz-checksum-crc32": checksum}, verify_checksums=True) as options,
        asyncshard.stream(URL, storage_options=options, chunk_size=4096) as weights,
    ):
        _require_same({name: tensor.copy() async for name, tensor in weights})
        assert weights.statistics().verified == (f"{URL}/{NAME}",)


async def cache() -> None:
    """Keep what was read on the disk, and write digests of tensors."""
    store = MemoryStore({NAME: FILE})
    with tempfile.TemporaryDirectory() as folder:
        _require_same(await asyncshard.load(store, cache_dir=folder))
        report = await asyncshard.verify_cache(folder)
        assert (report.entries, report.dropped) == (1, ())
    with tempfile.TemporaryDirectory() as folder:
        await asyncshard.save_sharded_state(TENSORS, folder, rank=0, digests=True)
        live = {name: np.zeros_like(tensor) for name, tensor in TENSORS.items()}
        update = await asyncshard.ShardedStateLoader().prepare_refresh(folder, live)
        await update.apply()
        _require_same(live)


async def torch() -> None:
    """Deliver torch tensors, fill a module's parameters, and save them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        path.write_bytes(FILE)
        weights = await asyncshard.load(path, framework="pt")
        _require_same({name: tensor.numpy() for name, tensor in weights.items()})
        import torch

        state = torch.nn.ParameterDict({name: torch.zeros(tensor.shape) for name, tensor in TENSORS.items()})
        await asyncshard.ShardedStateLoader().load_weights(path, state.state_dict())
        _require_same({name: tensor.detach().numpy() for name, tensor in state.items()})
        await asyncshard.save_sharded_state(state.state_dict(), Path(folder, "saved"), rank=0)
        _require_same(await asyncshard.load(Path(folder, "saved")))


async def demo() -> None:
    """Run the demo, with a server of its own."""
    with _example("demo.py", "--no-progress") as output:
        assert "From S3\n" in output


async def serve() -> None:
    """Start the server, and ask until its weights are in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, NAME)
        path.write_bytes(FILE)
        with _example("serve.py", path, "--port", "0") as output:
            address = next(found[1] for line in output if (found := re.search(r"running on (http://\S+)", line)))
            while not _is_ready(f"{address}/ready"):
                pass


PROMISES: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "s3": s3,
    "checksums": checksums,
    "cache": cache,
    "torch": torch,
    "demo": demo,
    "serve": serve,
}
"""Of each extra in pyproject.toml, apart from that of the tests, what it promises."""


@contextlib.asynccontextmanager
async def _served(headers: dict[str, str] | None = None, **more: Any) -> AsyncIterator[dict[str, Any]]:
    """Serve a file as S3 does; yield the storage options that reach it."""
    async with S3Server() as server:
        server.put("models", f"m/{NAME}", FILE, headers=headers or {})
        yield {"endpoint_url": server.endpoint_url, "region_name": "us-east-1", "unsigned": True, **more}


def _require_same(weights: dict[str, Any]) -> None:
    assert weights.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(weights[name], tensor)


@contextlib.contextmanager
def _example(name: str, *arguments: str | Path) -> Iterator[Iterator[str]]:
    """Run an example; yield the lines that it prints. ImportError where it says that a package is not installed."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        if "is not installed" in first:
            raise ImportError(first.strip())
        yield itertools.chain([first], process.stdout)
        process.terminate()
        process.stdout.read()  # it says goodbye, which fails where nobody listens any more
    assert process.returncode in (0, -signal.SIGTERM), f"{name} ended with {process.returncode}"


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return bool(response.status == 200)
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        return False
