"""The report of a check of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from asyncshard.plan.files.survey import Kind
from asyncshard.plan.text import count_of, enumerate_names, ranks_of


class DtypeUse(NamedTuple):
    """The number and the size of the tensors of one element type."""

    dtype: str
    """The format's name of the element type, such as ``"BF16"``."""
    num_tensors: int
    """The number of tensors."""
    nbytes: int
    """The number of bytes of these tensors."""


class RankFiles(NamedTuple):
    """The number of files of one rank."""

    pp_rank: int
    """The pipeline stage of the rank."""
    rank: int
    """The rank within its pipeline stage."""
    parts: int
    """The number of files."""


class DamagedFile(NamedTuple):
    """A file that could not be read, or is not a valid safetensors file."""

    name: str
    """The name of the file."""
    error: str
    """What is wrong, where, and what to do."""


class Tie(NamedTuple):
    """Two names for one tensor."""

    name: str
    """The name that no file holds."""
    stored_name: str
    """The name under which a file holds the tensor."""


_KINDS = {
    "ranks": "rank shards",
    "index": "a Hugging Face checkpoint with an index",
    "single": "one file",
    "shards": "numbered shards without an index",
    None: "no checkpoint",
}


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """The contents of a checkpoint, and its problems. ``print(report)`` shows it as text."""

    path: str
    """The path or URL of the checkpoint."""
    layout: Kind | None
    """``ranks``, ``index``, ``single``, ``shards`` (numbered shards whose index is missing), or None."""
    is_complete: bool
    """Whether nothing is missing, damaged or contradictory, so that the loaders would load it for every rank."""
    problems: tuple[str, ...] = ()
    """A sentence for each thing that is wrong or doubtful: what it is, where it is, and what to do."""
    world_size: int | None = None
    """The number of ranks in each pipeline stage; None for a layout without ranks."""
    parts: tuple[RankFiles, ...] = ()
    """The ranks that have files, in order."""
    num_files: int = 0
    """The number of existing files of the checkpoint, damaged ones included."""
    num_tensors: int = 0
    """The number of tensors in all valid files; a tensor that several ranks hold counts for each of them."""
    nbytes: int = 0
    """The number of bytes of these tensors."""
    dtypes: tuple[DtypeUse, ...] = ()
    """The element types of these tensors; the one with the most bytes is first."""
    missing_files: tuple[str, ...] = ()
    """The first of the missing files; ``*`` stands for the parts of a rank whose number of parts is unknown."""
    num_missing_files: int = 0
    """The number of all missing files."""
    extra_files: tuple[str, ...] = ()
    """Safetensors files in the directory that do not belong to the checkpoint."""
    copies: tuple[str, ...] = ()
    """The extra files that seem to hold the same weights again."""
    damaged: tuple[DamagedFile, ...] = ()
    """Files that exist and cannot be read, extra files included."""
    ties: tuple[Tie, ...] = ()
    """Tied tensors, by the metadata of the files or by ``tie_word_embeddings`` in ``config.json``."""

    @property
    def is_ok(self) -> bool:
        """Whether the check found no problem."""
        return not self.problems

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have files."""
        return tuple(sorted({files.rank for files in self.parts}))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """The pipeline stages that have files."""
        return tuple(sorted({files.pp_rank for files in self.parts}))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.path}: {_KINDS[self.layout]}, {self._verdict()}"
        if self.parts:
            counts = sorted({files.parts for files in self.parts})
            parts = count_of(counts[0], "part") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} parts"
            stages = f", {count_of(len(self.pp_ranks), 'pipeline stage')}" if len(self.pp_ranks) > 1 else ""
            yield f"  {ranks_of(self.ranks)} of a world of {self.world_size}{stages}; {parts} each"
        tensors = f"{count_of(self.num_tensors, 'tensor')}, {self.nbytes:,} bytes"
        yield f"  {count_of(self.num_files, 'file')}, {tensors}"
        for use in self.dtypes:
            yield f"  {use.dtype}: {count_of(use.num_tensors, 'tensor')}, {use.nbytes:,} bytes"
        if self.ties:
            yield "  tied: " + enumerate_names([f"{tie.name} is {tie.stored_name}" for tie in self.ties])
        for problem in self.problems:
            yield f"  - {problem}"

    def _verdict(self) -> str:
        if self.is_ok:
            return "complete"
        state = "complete, but with" if self.is_complete else "not complete:"
        return f"{state} {count_of(len(self.problems), 'problem')}"
