"""Saves of a rank over an earlier one, killed, failing and at the same time as loads: one version, or a refusal.

What is written, and how arguments are checked, is tested in ``tests/loaders/test_save.py``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

import asyncshard
from asyncshard import ShardedStateLoader, ShardPattern, check_checkpoint, save_sharded_state
from asyncshard.errors import CheckpointError, ObjectChangedError, StoreError, TargetExistsError
from asyncshard.format.save_id import SAVE_KEY, save_id_of
from asyncshard.pipeline.writing.save import is_save_folder
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME, rank_mark

MARK = rank_mark(ShardPattern(), 0, 0)


def state_of(version: int, parts: int) -> dict[str, Any]:
    return {f"t{number}": np.full(64, version, np.int32) for number in range(parts)}


async def save(path: Path, version: int, parts: int, **options: Any) -> list[str]:
    return await save_sharded_state(state_of(version, parts), path, **{"rank": 0, "max_shard_size": 1, **options})


async def load(path: Path) -> tuple[int, int]:
    """Return version and parts of what is loaded."""
    weights = await asyncshard.load(path)
    (version,) = {int(value) for array in weights.values() for value in array}
    return version, len(weights)


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def part_names(count: int) -> list[str]:
    return [f"model-rank-0-part-{part}.safetensors" for part in range(count)]


def run_script(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)


KILLED = """
import asyncio, itertools, json, os, random, shutil, signal, sys
import numpy as np
import asyncshard

path, old_parts, new_parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
steps, last = itertools.count(1), 0

def watched(real):
    "Kill this process before its step number `last` among those that change files."
    def call(*args, **options):
        if next(steps) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    return call

os.fsync = os.fstat  # a disk that is quick
for name in ("open", "fsync", "replace", "unlink", "makedirs", "rmdir"):
    setattr(os, name, watched(getattr(os, name)))

async def save(version, parts):
    state = {f"t{number}": np.full(1 << 14, version, np.int32) for number in range(parts)}
    await asyncshard.save_sharded_state(state, path, rank=0, max_shard_size=1)

async def outcome():
    try:
        weights = await asyncshard.load(path)
        found = ({int(array[0]) for array in weights.values()}, len(weights))
    except asyncshard.errors.CheckpointError as error:
        assert error.retryable and "asyncshard-incomplete" in str(error), error
        found = "refused"
    except asyncshard.errors.ObjectNotFoundError:
        found = ({1}, 0)
    kinds = {"refused": "refused", str(({1}, old_parts)): "old", str(({2}, new_parts)): "new"}
    try:
        assert (await asyncshard.check_checkpoint(path)).is_complete == (found not in ("refused", ({1}, 0)))
    except asyncshard.errors.ObjectNotFoundError:
        assert found == ({1}, 0)
    return kinds.get(str(found), f"wrong: {found}")

async def one(number):
    global steps, last
    if old_parts:
        await save(1, old_parts)
    child = os.fork()
    if not child:
        steps, last = itertools.count(1), number
        if not number:
            signal.setitimer(signal.ITIMER_REAL, random.random() * 0.03)
        asyncio.run(save(2, new_parts))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = await outcome()
    await save(3, 2)
    names = sorted(os.listdir(path))
    assert names == [f"model-rank-0-part-{part}.safetensors" for part in range(2)], names
    shutil.rmtree(path)
    return found, status

outcomes = []
for number in range(1, 1000):
    found, status = asyncio.run(one(number))
    outcomes.append(found)
    if not status:
        break
for _ in range(8):
    found, _ = asyncio.run(one(0))
    assert found in ("old", "refused", "new"), found
print(json.dumps(outcomes))
"""


@pytest.mark.parametrize(("old", "new"), [(0, 2), (2, 3), (3, 2), (1, 1)])
def test_a_save_killed_before_any_step_leaves_a_whole_version_or_what_readers_refuse(
    tmp_path: Path, old: int, new: int
) -> None:
    result = run_script(KILLED, str(tmp_path / "out"), str(old), str(new))
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert set(outcomes) == ({"old", "new"} if (old, new) == (1, 1) else {"old", "refused", "new"})


def break_replace(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Make each rename from number `count` on fail, as if the process were gone."""
    real, done = os.replace, [0]

    def replace(source: str, target: str) -> None:
        done[0] += 1
        if done[0] >= count:
            raise OSError(5, os.strerror(5))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


async def stop_within_commit(path: Path) -> None:
    """Leave a save of version 2 stopped between its renames, over one of version 1."""
    await save(path, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        break_replace(patch, 3)
        with pytest.raises(StoreError):
            await save(path, 2, 2)
    assert MARK in names_in(path)


async def test_a_save_that_fails_between_renames_gives_the_old_version_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save(tmp_path, 1, 3)
    real, done = os.replace, []

    def replace(source: str, target: str) -> None:
        done.append(target)
        if len(done) == 6:
            raise OSError(5, os.strerror(5))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StoreError, match="Input/output error"):
        await save(tmp_path, 2, 3)
    assert names_in(tmp_path) == part_names(3)
    assert await load(tmp_path) == (1, 3)


async def test_the_next_save_ends_what_a_stopped_one_began_even_if_it_fails_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stop_within_commit(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise safetensors.SafetensorError("no space (os error 28)")

    monkeypatch.setattr(safetensors, "serialize_file", fail)
    with pytest.raises(StoreError, match="No space left"):
        await save(tmp_path, 3, 2)
    assert await load(tmp_path) == (2, 2)
    assert names_in(tmp_path) == part_names(2)


async def test_every_reader_refuses_a_rank_whose_save_was_stopped_and_other_ranks_load(tmp_path: Path) -> None:
    await save(tmp_path, 1, 2, rank=1)
    await stop_within_commit(tmp_path)
    rank = ShardedStateLoader(rank=0, world_size=2)
    for refused_by in (
        rank.load_weights(tmp_path),
        rank.discover_shards(tmp_path),
        asyncshard.stream(tmp_path, world_size=2).drain(),
        asyncshard.IncrementalShardLoader(rank).load_weights_incremental(tmp_path, lambda *_: None),
        asyncshard.IncrementalShardLoader(rank).get_tensor(tmp_path, "t0"),
        asyncshard.reshard(tmp_path, tmp_path / "x", world_size=1),
    ):
        with pytest.raises(CheckpointError, match="rank 0 is incomplete"):
            await refused_by
    assert len(await ShardedStateLoader(rank=1, world_size=2).load_weights(tmp_path)) == 2
    report = await check_checkpoint(tmp_path)
    assert not report.is_complete
    assert any("rank 0 is incomplete" in problem for problem in report.problems)


async def test_a_load_during_a_commit_is_refused_as_retryable_at_each_rename(tmp_path: Path) -> None:
    await save(tmp_path, 1, 3)
    real, found = os.replace, []

    def replace(source: str, target: str) -> None:
        real(source, target)
        try:
            found.append(asyncio.run(load(tmp_path)))
        except (CheckpointError, ObjectChangedError) as error:
            found.append(error.retryable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", replace)
        await save(tmp_path, 2, 2)
    assert found == [True] * 6  # the mark, three old files, two new ones
    assert await load(tmp_path) == (2, 2)


async def test_loads_beside_saves_get_one_version_or_a_retryable_error(tmp_path: Path) -> None:
    await save(tmp_path, 0, 3)
    ended = threading.Event()
    errors: list[BaseException] = []

    def save_all() -> None:
        try:
            for version in range(1, 40):
                asyncio.run(save(tmp_path, version, 2 + version % 3))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    trainer = threading.Thread(target=save_all)
    trainer.start()
    seen: Counter[str] = Counter()
    while not ended.is_set():
        try:
            version, parts = await load(tmp_path)
            assert parts == 2 + version % 3 or not version
            seen["loaded"] += 1
        except (CheckpointError, ObjectChangedError) as error:
            seen[f"retryable: {error.retryable}"] += 1
    trainer.join()
    assert not errors
    assert not seen["retryable: False"]
    assert seen["loaded"]
    assert await load(tmp_path) == (39, 2)


async def test_a_second_save_of_a_rank_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    results = await asyncio.gather(*(save(tmp_path, number, 5) for number in (1, 2)), return_exceptions=True)
    (error,) = [result for result in results if isinstance(result, BaseException)]
    assert isinstance(error, StoreError)
    assert error.retryable
    assert "another save of rank 0 is writing there" in str(error)
    assert (await load(tmp_path))[1] == 5
    assert names_in(tmp_path) == part_names(5)


async def test_files_that_a_killed_save_left_are_removed_by_the_next_one(tmp_path: Path) -> None:
    folder = tmp_path / ".asyncshard-model-rank-0-part-0.safetensors.tmp"
    for path in (folder / ("0" * 32), folder / ("1" * 32)):
        path.mkdir(parents=True)
        (path / "model-rank-0-part-0.safetensors").write_bytes(bytes(1000))
    (tmp_path / ".other.tmp").mkdir()
    other = tmp_path / ".asyncshard-model-rank-1-part-0.safetensors.tmp"
    other.mkdir()
    await save(tmp_path, 1, 2)
    assert names_in(tmp_path) == sorted([*part_names(2), ".other.tmp", other.name])


async def test_a_folder_with_the_name_of_a_part_is_left_alone(tmp_path: Path) -> None:
    await save(tmp_path, 1, 2)
    (tmp_path / "model-rank-0-part-7.safetensors").mkdir()
    with pytest.raises(TargetExistsError, match="this is a folder"):
        await save(tmp_path, 2, 2)
    assert len(names_in(tmp_path)) == 3
    os.rmdir(tmp_path / "model-rank-0-part-7.safetensors")
    assert await load(tmp_path) == (1, 2)


# Ids of saves


async def test_all_parts_have_the_id_of_their_save_and_ranks_have_different_ones(tmp_path: Path) -> None:
    ids = []
    for rank in range(2):
        paths = await save(tmp_path, 1, 3, rank=rank)
        found = {save_id_of((await asyncshard.read_header(path)).metadata) for path in paths}
        (save_id,) = found
        assert save_id is not None
        assert save_id.parts == 3
        ids.append(save_id.id)
    assert len(set(ids)) == 2


async def test_the_key_of_the_id_cannot_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=SAVE_KEY):
        await save(tmp_path, 1, 1, metadata={SAVE_KEY: "x"})
    assert names_in(tmp_path) == []


async def mixed(tmp_path: Path, kind: str) -> Path:
    """Return a directory whose files a copy has mixed up."""
    old, new = tmp_path / "old", tmp_path / "new"
    await save(old, 1, 3)
    await save(new, 2, 2)
    if kind == "two saves":
        shutil.copy(new / part_names(2)[1], old)
    elif kind == "no id":
        save_file({"t1": np.zeros(64, np.int32)}, old / part_names(2)[1])
    else:
        os.unlink(old / part_names(3)[2])
    return old


@pytest.mark.parametrize("kind", ["two saves", "no id", "the last part is missing"])
async def test_files_of_more_than_one_save_are_refused(tmp_path: Path, kind: str) -> None:
    path = await mixed(tmp_path, kind)
    loader = ShardedStateLoader()
    for refused_by in (
        asyncshard.load(path),
        loader.load_weights(path, state_of(0, 3)),
        asyncshard.stream(path).drain(),
        ShardedStateLoader(tensor_filter=["t0"]).load_weights(path),
        asyncshard.IncrementalShardLoader().load_weights_incremental(path, lambda *_: None),
        asyncshard.reshard(path, tmp_path / "x", world_size=1, layout="ranks"),
    ):
        with pytest.raises(ObjectChangedError, match="save the rank again") as caught:
            await refused_by
        assert caught.value.retryable
    report = await check_checkpoint(path)
    assert not report.is_complete
    (problem,) = report.problems
    assert problem == str(caught.value)


async def test_ranks_of_different_steps_are_reported(tmp_path: Path) -> None:
    for rank, step in enumerate(["1200", "1200", "1100"]):
        await save(tmp_path, 1, 2, rank=rank, metadata={"step": step})
    report = await check_checkpoint(tmp_path)
    assert not report.is_complete
    (problem,) = report.problems
    assert "'1200' of rank 0, rank 1, '1100' of rank 2" in problem
    await save(tmp_path, 1, 2, rank=2, metadata={"step": "1200"})
    assert (await check_checkpoint(tmp_path)).is_ok


async def test_ranks_that_do_not_tell_their_step_are_not_compared(tmp_path: Path) -> None:
    await save(tmp_path, 1, 2)
    await save(tmp_path, 1, 2, rank=1, metadata={"step": "1200"})
    assert (await check_checkpoint(tmp_path)).is_ok


# Beside reshards


async def test_a_save_into_a_directory_whose_reshard_has_not_ended_is_refused(tmp_path: Path) -> None:
    (tmp_path / INCOMPLETE_NAME).touch()
    with pytest.raises(CheckpointError, match="Run reshard again"):
        await save(tmp_path, 1, 1)
    assert names_in(tmp_path) == [INCOMPLETE_NAME]


async def test_a_reshard_over_a_stopped_save_removes_what_that_left(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    save_file({"w": np.ones(4)}, source / "model.safetensors")
    await stop_within_commit(target)
    await asyncshard.reshard(source, target, world_size=1, overwrite=True)
    assert names_in(target) == ["model.safetensors"]
    assert list(await asyncshard.load(target)) == ["w"]


async def test_a_reshard_keeps_no_id_of_a_save(tmp_path: Path) -> None:
    await save(tmp_path / "source", 1, 2)
    await asyncshard.reshard(tmp_path / "source", tmp_path / "hf", world_size=1, tp_plan={"t0": "rowwise"}, layout="hf")
    assert SAVE_KEY not in (await asyncshard.read_header(tmp_path / "hf" / "model.safetensors")).metadata


def test_a_folder_of_saves_is_known_by_its_name() -> None:
    assert is_save_folder(".asyncshard-model-rank-0-part-0.safetensors.tmp")
    assert not is_save_folder(".asyncshard-reshard")


# The end of the interpreter

ENDING = """
import asyncio, sys, threading
import numpy as np
import asyncshard
from asyncshard.pipeline.writing import directory

state = {f"t{number}": np.ones(1 << 18) for number in range(6)}
begun = threading.Semaphore(0)
real = directory.DirectoryWriter.flush

def flush(*args):
    begun.release()
    real(*args)

directory.DirectoryWriter.flush = flush

async def save_for_ever():
    while True:
        await asyncshard.save_sharded_state(state, sys.argv[1], rank=0, max_shard_size=1)

threading.Thread(target=lambda: asyncio.run(save_for_ever()), daemon=True).start()
for _ in range(int(sys.argv[2])):
    begun.acquire()
"""


@pytest.mark.parametrize("parts", [1, 2, 6, 7, 8, 12])
def test_the_end_of_the_interpreter_during_a_save_is_no_abort_and_leaves_one_version(
    tmp_path: Path, parts: int
) -> None:
    result = run_script(ENDING, str(tmp_path), str(parts))
    assert result.returncode == 0, result.stderr
    if parts > 6:
        assert asyncio.run(load_ones(tmp_path)) == 6


async def load_ones(path: Path) -> int:
    return len(await asyncshard.load(path))
