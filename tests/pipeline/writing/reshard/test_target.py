"""What a reshard may replace. Most of it is tested in ``tests/loaders/test_reshard.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asyncshard import ShardPattern
from asyncshard._core import StopFlag
from asyncshard.errors import StoreError
from asyncshard.pipeline.writing.directory import DirectoryWriter, Role
from asyncshard.pipeline.writing.reshard.target import Target, index_text
from asyncshard.plan.files.incomplete import rank_mark

SAVE_FOLDER = ".asyncshard-model-rank-0-part-0.safetensors.tmp"


def write(path: Path) -> None:
    target = Target(str(path), None, overwrite=True)
    try:
        target.begin(["model.safetensors"])
        target.write("model.safetensors", 0, [memoryview(b"ab"), memoryview(b"c")], StopFlag())
        target.flush("model.safetensors")
        target.commit(["model.safetensors"])
    finally:
        target.clean_up()


def test_marks_of_ranks_and_folders_of_killed_saves_go_with_the_old_weights(tmp_path: Path) -> None:
    for name in ("model-rank-0-part-0.safetensors", rank_mark(ShardPattern(), 0, 0), "notes.md"):
        (tmp_path / name).touch()
    (tmp_path / SAVE_FOLDER).mkdir()
    (tmp_path / SAVE_FOLDER / "lock").touch()
    write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "notes.md"}
    assert (tmp_path / "model.safetensors").read_bytes() == b"abc"


def test_a_directory_in_which_a_save_is_writing_is_refused(tmp_path: Path) -> None:
    save = DirectoryWriter(str(tmp_path), Role(SAVE_FOLDER, "mark", "", "busy"))
    save.begin()
    with pytest.raises(StoreError, match="a save is writing there"):
        write(tmp_path)
    save.clean_up()
    write(tmp_path)


def test_the_text_of_an_index_is_json() -> None:
    text = "".join(index_text(3, [('a"b', "one"), ("c", "two")]))
    assert json.loads(text) == {"metadata": {"total_size": 3}, "weight_map": {'a"b': "one", "c": "two"}}
