"""The small files beside the weights are chosen by name and copied byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from asyncshard.pipeline.writing.reshard import companions
from asyncshard.pipeline.writing.reshard.companions import companion_files, copy_companions
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.stores import from_url


def test_configurations_and_tokenizers_come_along_and_weights_and_indexes_do_not() -> None:
    wanted = ["config.json", "chat_template.jinja", "merges.txt", "tokenizer.model"]
    others = ["model.safetensors", "model.safetensors.index.json", ".hidden.json", "README.md", "pytorch_model.bin"]
    assert companion_files([*others, *wanted]) == wanted


@pytest.mark.parametrize("memory_bytes", [11, 50, 1000])
async def test_a_file_is_copied_whole_through_any_memory(
    tmp_path: Path, folder: str, threads: Any, memory_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(companions, "_FIRST_READ", 16)
    files = {"config.json": bytes(range(100)), "empty.txt": b"", "short.txt": b"abc"}
    source = tmp_path / "source"
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    (source / "folder.json").mkdir()
    target = Target(folder, None, overwrite=False)
    async with from_url(source) as store:
        try:
            target.begin(files)
            names = [*files, "folder.json"]
            copied = await copy_companions(store, names, target, np.zeros(memory_bytes, np.uint8), threads)
            target.commit(copied)
        finally:
            target.clean_up()
    assert copied == list(files)  # a folder is no file
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == files
