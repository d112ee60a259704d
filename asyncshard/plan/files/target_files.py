"""The files of a checkpoint that is to be written: which tensors each file holds, and at which offsets."""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

import numpy as np

from asyncshard._typing import Int64Array
from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.files.layout import SINGLE_NAME
from asyncshard.plan.ranges import merge_ranges


class TargetFile(NamedTuple):
    """One file to be written."""

    name: str
    rank: int
    """The rank to which the file belongs."""
    tensors: Int64Array
    """Indexes of the tensors of the file, in the order of their bytes."""


class TargetFiles(NamedTuple):
    """All files to be written, and where each tensor of each rank lies in them."""

    files: tuple[TargetFile, ...]
    file_of: Int64Array
    """For each rank, the index in `files` of the file that holds each tensor."""
    offsets: Int64Array
    """For each rank, the offset of each tensor in the data of its file."""


def lay_out(
    sizes: Int64Array, element_bytes: Int64Array, *, max_shard_size: int, pattern: ShardPattern | None
) -> TargetFiles:
    """Distribute the tensors over files.

    In a file, tensors with wider elements come first, so that all tensors are aligned; otherwise they keep their order.

    Parameters
    ----------
    sizes : array of int64
        The number of bytes of each tensor, in a row for each rank.
    element_bytes : array of int64
        The number of bytes of an element of each tensor; 1 for elements smaller than a byte.
    max_shard_size : int
        The most bytes of tensors in a file; a larger tensor has a file of its own.
    pattern : ShardPattern, optional
        The pattern of the names of rank shards; None for the names of Hugging Face shards, with one rank.
    """
    world_size, count = sizes.shape
    file_of = np.empty((world_size, count), np.int64)
    offsets = np.empty((world_size, count), np.int64)
    files: list[TargetFile] = []
    for rank in range(world_size):
        bounds = _parts(sizes[rank], max_shard_size)
        for part, (first, last) in enumerate(bounds):
            tensors = first + np.argsort(-element_bytes[first:last], kind="stable")
            ends = np.cumsum(sizes[rank, tensors])
            file_of[rank, first:last] = len(files)
            offsets[rank, tensors] = ends - sizes[rank, tensors]
            name = _hugging_face_name(part, len(bounds)) if pattern is None else pattern.format_for_rank(rank, part)
            files.append(TargetFile(name, rank, tensors))
    return TargetFiles(tuple(files), file_of, offsets)


def _parts(sizes: Int64Array, limit: int) -> list[tuple[int, int]]:
    """Return the first and last index (half-open) of the tensors of each file: at most `limit` bytes, or one tensor."""
    bounds = merge_ranges(np.cumsum(sizes) - sizes, sizes, max_gap=0, max_bytes=limit, max_count=sys.maxsize)
    return list(itertools.pairwise(bounds.tolist())) or [(0, 0)]


def _hugging_face_name(part: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{part + 1:05}-of-{count:05}.safetensors"
