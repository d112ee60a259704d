"""A summary of the bytes that a load reads, for users to look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile


@dataclass(frozen=True, slots=True)
class FilePlan:
    """The bytes that a load reads of one file."""

    path: str
    """Its full path or URL."""
    tensors: int
    """How many are wanted of it, those that are empty included."""
    bytes_needed: int
    """Bytes of these tensors, or of the rank's slices of them."""
    bytes_read: int
    """With what lies between slices that are read together, at most; headers are not counted."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The bytes that a load reads of a checkpoint."""

    files: tuple[FilePlan, ...]
    """In delivery order; files of which nothing is wanted are left out."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, max_gap: int) -> Self:
        files: dict[str, FilePlan] = {}
        for shard in checkpoint.shards:
            files[shard.path] = _with(files.get(shard.path), shard, max_gap)
        return cls(tuple(files.values()))

    @property
    def tensors(self) -> int:
        return sum(file.tensors for file in self.files)

    @property
    def bytes_needed(self) -> int:
        return sum(file.bytes_needed for file in self.files)

    @property
    def bytes_read(self) -> int:
        return sum(file.bytes_read for file in self.files)


def _with(before: FilePlan | None, shard: OpenedFile, max_gap: int) -> FilePlan:
    """Return what is read of a file when a shard is too; a tied tensor is a shard of its own."""
    needed = shard.data_bytes
    read = needed if shard.slice is None else shard.slice.bytes_read(max_gap)
    tensors = len(shard.header)
    if before is None:
        return FilePlan(shard.path, tensors, needed, read)
    return FilePlan(shard.path, before.tensors + tensors, before.bytes_needed + needed, before.bytes_read + read)
