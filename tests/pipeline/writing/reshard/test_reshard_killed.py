"""Reshards killed at each of their steps, and held to their budget: in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import asyncshard

MIB = 1 << 20

KILLED = """
import asyncio, itertools, json, os, shutil, signal, sys
import asyncshard
from safetensors.numpy import load_file

source, root, is_overwriting = sys.argv[1], sys.argv[2], sys.argv[3] == "overwrite"
target = os.path.join(root, "target")
PLAN = {"layers.*.q": "colwise"}
steps, last = itertools.count(1), 0

def watched(real):
    "Kill this process before its step number `last` among those that change files."
    def call(*args, **options):
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call

for name in ("open", "pwritev", "fsync", "replace", "unlink", "makedirs", "rmdir"):
    setattr(os, name, watched(getattr(os, name)))

async def run(overwrite=False):
    await asyncshard.reshard(source, target, world_size=2, tp_plan=PLAN, chunk_size=4096, memory_budget_mb=1,
                             overwrite=overwrite)

def prepare():
    shutil.rmtree(target, ignore_errors=True)
    if is_overwriting:
        os.makedirs(target)
        shutil.copy(os.path.join(source, "model.safetensors"), target)

def contents(*path):
    return {name: tensor.tobytes() for name, tensor in load_file(os.path.join(*path)).items()}

async def read():
    "Return what readers make of the target: what they get, or the names of their errors."
    found = []
    for rank in range(2):
        try:
            tensors = await asyncshard.ShardedStateLoader(rank=rank, world_size=2).load_weights(target)
            found.append({name: tensor.tobytes() for name, tensor in tensors.items()})
        except (asyncshard.errors.CheckpointError, asyncshard.errors.ObjectNotFoundError) as error:
            found.append(type(error).__name__)
    try:
        is_complete = (await asyncshard.check_checkpoint(target)).is_complete
    except asyncshard.errors.ObjectNotFoundError:
        is_complete = False
    return found, is_complete

def outcome():
    found, is_complete = asyncio.run(read())
    for kind, expected in (("new", NEW), ("old", OLD)):
        if found == expected and is_complete:
            return kind
    if all(isinstance(each, str) for each in found) and not is_complete:
        return "refused"
    return f"wrong: complete {is_complete}, {[each if isinstance(each, str) else 'tensors' for each in found]}"

prepare()
first = next(steps)
asyncio.run(run(is_overwriting))
total = next(steps) - first - 1
NEW = [contents(target, f"model-rank-{rank}-part-0.safetensors") for rank in range(2)]
OLD = [contents(source, "model.safetensors")] * 2
outcomes = {}
for number in range(1, total + 1):
    prepare()
    child = os.fork()
    if not child:
        steps, last = itertools.count(1), number
        asyncio.run(run(is_overwriting))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    # How often the source is opened varies: the last numbers may be beyond the end.
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), (number, status)
    outcomes[number] = outcome()
    if outcomes[number] == "refused":
        asyncio.run(run())  # what was killed may be run again as it is
        assert outcome() == "new"
        assert set(os.listdir(target)) == {f"model-rank-{rank}-part-0.safetensors" for rank in range(2)}
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(0)
    tensors = {f"layers.{index}.{name}.weight": random.random((40, 16)) for index in range(2) for name in "qo"}
    save_file(tensors, directory / "model.safetensors")
    return directory


def run_script(script: str, *args: str) -> str:
    result = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("how", ["fresh", "overwrite"])
def test_a_run_killed_before_any_step_leaves_what_readers_refuse_or_a_whole_checkpoint(
    source: Path, tmp_path: Path, how: str
) -> None:
    outcomes = list(json.loads(run_script(KILLED, str(source), str(tmp_path), how)).values())
    assert set(outcomes) == ({"refused", "new"} if how == "fresh" else {"old", "refused", "new"})
    order = sorted(outcomes, key=["old", "refused", "new"].index)
    assert outcomes == order  # never new and then refused again


LARGE = """
import asyncio, json, os, sys
import numpy as np
import asyncshard

MIB = 1 << 20

def status(field):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) * 1024

async def main(source, target, budget_mb):
    from safetensors.numpy import save_file
    small = os.path.join(target, "small")
    os.makedirs(small)
    save_file({"l.0.q.weight": np.ones((8, 8))}, os.path.join(small, "model.safetensors"))
    plan = {"l.*.q": "colwise", "l.*.o": "rowwise"}
    await asyncshard.reshard(small, small + "2", world_size=2, tp_plan={"l.*.q": "colwise"}, memory_budget_mb=1)
    before = status("VmRSS")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        before = status("VmHWM")
    path = source
    for world_size in (4, 2, 1):
        await asyncshard.reshard(path, os.path.join(target, str(world_size)), world_size=world_size,
                                 tp_plan=plan if path == source else None, memory_budget_mb=budget_mb)
        path = os.path.join(target, str(world_size))
    print(json.dumps(status("VmHWM") - before))

asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
"""


@pytest.mark.parametrize("budget_mb", [2, 8])
def test_memory_stays_within_the_budget_for_any_size_and_shape(tmp_path: Path, budget_mb: int) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    header, offset = {}, 0
    # The last one is cut into runs of two bytes.
    shapes = {
        "l.0.q.weight": (2048, 4096),
        "l.1.o.weight": (2048, 4096),
        "l.2.o.weight": (1 << 19, 4),
        "l.3.n.weight": (4 << 20,),
    }
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    path = source / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + os.urandom(MIB) * (offset // MIB))
    extra = int(run_script(LARGE, str(source), str(tmp_path / "out"), str(budget_mb)))
    assert extra <= (budget_mb + 32) * MIB
    back = (tmp_path / "out" / "1" / "model.safetensors").read_bytes()
    data, whole = path.read_bytes(), asyncshard.parse_header(back)
    for name, info in asyncshard.parse_header(data).items():
        other = whole[name]
        assert back[other.start : other.stop] == data[info.start : info.stop]
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
