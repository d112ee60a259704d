"""The memory promises, by the peak resident size of child processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import asyncshard

MIB = 1 << 20
COUNT, SIZE = 75, 4 * MIB
SLACK = 16 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """300 MB in two parts."""
    directory = tmp_path_factory.mktemp("checkpoint")
    header = {}
    for part in range(2):
        names = [f"t{index:02}" for index in range(COUNT)][part::2]
        header = {
            name: {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [at * SIZE, (at + 1) * SIZE]}
            for at, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        with (directory / f"model-rank-0-part-{part}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(np.full(SIZE // 4, int(name[1:]), "<f4").data)
    yield directory
    for path in directory.iterdir():
        path.unlink()


CHILD = """
import asyncio, json, os, resource, sys
import numpy as np
import asyncshard

MIB = 1 << 20

def status(field):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024

class Peak:
    "Measures how far resident memory rises above where it was."
    def __enter__(self):
        self.before = status("VmRSS")
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            self.can_reset = True
        except OSError:
            # The peak so far counts instead: what stays below it cannot be told.
            self.can_reset = False
            self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return self
    def __exit__(self, *exc_info):
        peak = status("VmHWM") if self.can_reset else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.extra = peak - self.before

async def warm_up(path):
    "Import and start all there is, with a small load of each kind."
    small = os.path.join(path, "..", "small.safetensors")
    from safetensors.numpy import save_file
    save_file({"w": np.ones(10, np.float32)}, small)
    await asyncshard.ShardedStateLoader().load_weights(small, {"w": np.zeros(10, np.float32)})
    await asyncshard.stream(small, memory_budget_mb=1).drain()
    os.unlink(small)

async def main(path):
    await warm_up(path)
    with Peak() as peak:
        held = await run(path)
    print(json.dumps({"extra": peak.extra, "held": held, "can_reset": peak.can_reset}))
"""

IN_PLACE = """
state = {f"t{i:02}": np.full((1024, 1024), -1, np.float32) for i in range(75)}
async def run(path):
    await asyncshard.ShardedStateLoader(**OPTIONS).load_weights(path, state)
    assert all((array[::64, ::64] == int(name[1:])).all() for name, array in state.items())
    return 0
"""

STRIDED = """
state = {f"t{i:02}": np.full((1024, 1024), -1, np.float32).T for i in range(75)}
async def run(path):
    await asyncshard.ShardedStateLoader(memory_budget_mb=32).load_weights(path, state)
    assert all((array[::64, ::64] == int(name[1:])).all() for name, array in state.items())
    return 0
"""

STREAM = """
async def run(path):
    count = 0
    async for name, tensor in asyncshard.stream(path, memory_budget_mb=32, framework=FRAMEWORK):
        assert tensor[0, 0] == tensor[1023, 1023] == int(name[1:])
        count += 1
    assert count == 75
    return 0
"""

BREAK = """
async def run(path):
    loader = asyncshard.AsyncShardLoader(memory_budget_mb=32)
    for _ in range(20):
        async with loader.stream(path) as stream:
            count = 0
            async for _ in stream:
                count += 1
                if count == 10:
                    break
    return 0
"""

KEEP = """
async def run(path):
    loader = asyncshard.AsyncShardLoader(memory_budget_mb=32)
    async with loader.stream(path) as stream:
        kept = {name: tensor async for name, tensor in stream}
        held = stream.statistics().bytes_held
    assert all((tensor[::64, ::64] == int(name[1:])).all() for name, tensor in kept.items())
    assert 75 * 4 * MIB - 32 * MIB <= held <= 75 * 4 * MIB
    return held
"""

KEEP_SOME = """
async def run(path):
    loader = asyncshard.AsyncShardLoader(memory_budget_mb=32)
    kept, most = {}, 0
    async with loader.stream(path) as stream:
        async for name, tensor in stream:
            if int(name[1:]) % 5 == 0:
                kept[name] = tensor
        held = stream.statistics().bytes_held
    assert len(kept) == 15
    return held
"""

NEW = """
async def run(path):
    weights = await asyncshard.load(path, memory_budget_mb=32)
    assert len(weights) == 75
    return sum(array.nbytes for array in weights.values())
"""


INCREMENTAL = """
async def run(path):
    names = []
    async with asyncshard.IncrementalShardLoader(memory_budget_mb=32) as loader:
        await loader.load_weights_incremental(path, lambda name, tensor: names.append(name))
    assert len(names) == 75
    return 0
"""

SHARDS = """
async def run(path):
    async with asyncshard.IncrementalShardLoader(memory_budget_mb=160) as loader:
        for part in (0, 1, 0, 1):
            shard = await loader.load_shard(f"{path}/model-rank-0-part-{part}.safetensors")
            assert all((tensor[::64, ::64] == int(name[1:])).all() for name, tensor in shard.items())
            del shard
        assert loader.statistics().evictions == 3
    return 0
"""

REFRESH = """
state = {f"t{i:02}": np.full((1024, 1024), i, np.float32) for i in range(75)}
first = {name: array for name, array in state.items() if int(name[1:]) < 8}
async def run(path):
    loader = asyncshard.ShardedStateLoader(memory_budget_mb=40)
    for _ in range(3):
        async with await loader.prepare_refresh(path, first, strict=False) as update:
            assert len(update.changed) == 8
            await update.apply()
    return 0
"""


def measure(checkpoint, code, prelude=""):
    run = "\nasyncio.run(main(sys.argv[1]))\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD + prelude + code + run, str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [{}, {"max_workers": 8, "prefetch_count": 64}, {"page_cache": "drop"}])
def test_loading_into_arrays_takes_16_mib_at_most(options, checkpoint):
    assert measure(checkpoint, IN_PLACE, f"OPTIONS = {options!r}\n")["extra"] <= SLACK


def test_loading_into_strided_arrays_takes_the_budget_and_16_mib_at_most(checkpoint):
    assert measure(checkpoint, STRIDED)["extra"] <= 32 * MIB + SLACK


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_streaming_takes_the_budget_and_16_mib_at_most(framework, checkpoint):
    prelude = f"FRAMEWORK = {framework!r}\n"
    if framework == "pt":
        pytest.importorskip("torch")
        prelude += "import asyncshard.arrays.torch\n"
    assert measure(checkpoint, STREAM, prelude)["extra"] <= 32 * MIB + SLACK


def test_streams_that_are_left_early_take_the_budget_and_16_mib_at_most(checkpoint):
    assert measure(checkpoint, BREAK)["extra"] <= 32 * MIB + SLACK


@pytest.mark.parametrize("code", [KEEP, KEEP_SOME], ids=["everything", "one in five"])
def test_a_consumer_that_keeps_tensors_pays_for_those_and_the_budget(code, checkpoint):
    result = measure(checkpoint, code)
    assert result["extra"] <= 32 * MIB + result["held"] + SLACK


def test_loading_incrementally_takes_the_budget_and_16_mib_at_most(checkpoint):
    assert measure(checkpoint, INCREMENTAL)["extra"] <= 32 * MIB + SLACK


def test_shards_that_give_way_to_each_other_take_the_budget_and_16_mib_at_most(checkpoint):
    assert measure(checkpoint, SHARDS)["extra"] <= 160 * MIB + SLACK


def test_refreshing_takes_the_budget_and_16_mib_at_most(checkpoint):
    assert measure(checkpoint, REFRESH)["extra"] <= 40 * MIB + SLACK


def test_new_arrays_take_their_own_size_and_16_mib_at_most(checkpoint):
    result = measure(checkpoint, NEW)
    assert result["extra"] <= result["held"] + SLACK


HEADER = """
count = 200_000
entry = '"model.layers.%d.self_attn.weight":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
entries = ",".join(entry % (i, i, i + 1) for i in range(count))
import tempfile
folder = tempfile.TemporaryDirectory()
text = ("{" + entries + "}").encode()
with open(folder.name + "/big", "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text + bytes(count))
size = len(text)
del text, entries
async def run(path):
    header = await asyncshard.read_header(folder.name + "/big")
    assert len(header) == count
    return size
"""


def test_a_large_header_takes_two_and_a_half_times_its_bytes(checkpoint):
    result = measure(checkpoint, HEADER)
    assert result["extra"] <= 2.5 * result["held"] + SLACK
