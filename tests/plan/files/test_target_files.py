"""Which tensors go into which file."""

from __future__ import annotations

import numpy as np

from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.files.target_files import lay_out


def test_files_are_full_before_the_next_begins_and_a_large_tensor_has_its_own() -> None:
    sizes = np.array([[40, 40, 30, 500, 10, 0]], np.int64)
    files = lay_out(sizes, np.ones(6, np.int64), max_shard_size=100, pattern=None)
    assert [file.tensors.tolist() for file in files.files] == [[0, 1], [2], [3], [4, 5]]
    assert [file.name for file in files.files] == [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    assert files.file_of.tolist() == [[0, 0, 1, 2, 3, 3]]
    assert files.offsets.tolist() == [[0, 40, 0, 0, 0, 10]]


def test_wide_elements_come_first_so_that_all_are_aligned() -> None:
    sizes = np.array([[3, 8, 2, 16]], np.int64)
    files = lay_out(sizes, np.array([1, 4, 2, 8]), max_shard_size=100, pattern=None)
    assert files.files[0].tensors.tolist() == [3, 1, 2, 0]
    assert files.offsets.tolist() == [[26, 16, 24, 0]]
    assert files.files[0].name == "model.safetensors"


def test_each_rank_has_parts_of_its_own() -> None:
    sizes = np.array([[60, 60], [10, 10]], np.int64)
    files = lay_out(sizes, np.ones(2, np.int64), max_shard_size=100, pattern=ShardPattern())
    assert [(file.name, file.rank) for file in files.files] == [
        ("model-rank-0-part-0.safetensors", 0),
        ("model-rank-0-part-1.safetensors", 0),
        ("model-rank-1-part-0.safetensors", 1),
    ]
    assert files.file_of.tolist() == [[0, 1], [2, 2]]


def test_no_tensors_are_one_empty_file_for_each_rank() -> None:
    files = lay_out(np.empty((2, 0), np.int64), np.empty(0, np.int64), max_shard_size=1, pattern=ShardPattern())
    assert [(file.name, len(file.tensors)) for file in files.files] == [
        ("model-rank-0-part-0.safetensors", 0),
        ("model-rank-1-part-0.safetensors", 0),
    ]
