"""The files of a checkpoint that is to be written: which tensors are in each, and where."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from asyncshard._typing import Int64Array
from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.files.layout import SINGLE_NAME


class TargetFile(NamedTuple):
    """One file to be written."""

    name: str
    rank: int
    tensors: Int64Array
    """Its tensors, in the order of its bytes."""


class TargetFiles(NamedTuple):
    """All files, and where each rank's tensors are in them."""

    files: tuple[TargetFile, ...]
    places: Int64Array
    """For each rank, the file of each tensor."""
    offsets: Int64Array
    """For each rank, the offset of each tensor in its file's data."""


def lay_out(
    sizes: Int64Array, element_bytes: Int64Array, *, max_shard_size: int, pattern: ShardPattern | None
) -> TargetFiles:
    """Share the tensors out among files.

    A file's tensors keep their order, but for wider elements coming first: so all are aligned.

    Parameters
    ----------
    sizes : array of int64
        Bytes of each tensor, in a row for each rank.
    element_bytes : array of int64
        Of each tensor; 1 for elements of less than a byte.
    max_shard_size : int
        Bytes of tensors in a file at most; a larger tensor has a file of its own.
    pattern : ShardPattern, optional
        Names of rank shards; None for those of Hugging Face, with one rank.
    """
    world_size, count = sizes.shape
    places = np.empty((world_size, count), np.int64)
    offsets = np.empty((world_size, count), np.int64)
    files: list[TargetFile] = []
    for rank in range(world_size):
        bounds = _parts(sizes[rank], max_shard_size)
        for part, (first, last) in enumerate(bounds):
            tensors = first + np.argsort(-element_bytes[first:last], kind="stable")
            ends = np.cumsum(sizes[rank, tensors])
            places[rank, first:last] = len(files)
            offsets[rank, tensors] = ends - sizes[rank, tensors]
            name = _hugging_face_name(part, len(bounds)) if pattern is None else pattern.format_for_rank(rank, part)
            files.append(TargetFile(name, rank, tensors))
    return TargetFiles(tuple(files), places, offsets)


def _parts(sizes: Int64Array, limit: int) -> list[tuple[int, int]]:
    """Cut into runs of tensors of at most `limit` bytes, or of one."""
    before = np.concatenate(([0], np.cumsum(sizes)))
    bounds: list[tuple[int, int]] = []
    first = 0
    while first < len(sizes) or not bounds:
        last = int(np.searchsorted(before, before[first] + limit, side="right")) - 1
        last = min(max(last, first + 1), len(sizes))
        bounds.append((first, last))
        first = last
    return bounds


def _hugging_face_name(part: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{part + 1:05}-of-{count:05}.safetensors"
