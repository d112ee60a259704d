"""What a check of a checkpoint has found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from asyncshard.plan.files.survey import Kind
from asyncshard.plan.text import count_of, enumerate_names, ranks_of


class DtypeUse(NamedTuple):
    """The tensors of one element type."""

    dtype: str
    """As the format spells it, such as ``"BF16"``."""
    num_tensors: int
    nbytes: int


class RankFiles(NamedTuple):
    """The files of one rank."""

    pp_rank: int
    rank: int
    parts: int
    """How many there are."""


class DamagedFile(NamedTuple):
    """A file that could not be read, or is no valid safetensors file."""

    name: str
    error: str
    """What is wrong, where, and what to do."""


class Tie(NamedTuple):
    """Two names for one tensor."""

    name: str
    """The one that is in no file."""
    stored_name: str
    """The one that is."""


_KINDS = {
    "ranks": "rank shards",
    "index": "a Hugging Face checkpoint with an index",
    "single": "one file",
    "shards": "numbered shards without an index",
    None: "no checkpoint",
}


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What a checkpoint is, and what is wrong with it. Print it to read it."""

    path: str
    """Path or URL that was checked."""
    layout: Kind | None
    """``ranks``, ``index``, ``single``, ``shards`` (numbered ones without the index that they need), or None."""
    is_complete: bool
    """Whether nothing is missing, damaged or contradictory: this library's loaders would load it, for every rank."""
    problems: tuple[str, ...] = ()
    """All that is wrong or doubtful, a sentence each: what, where, what to do."""
    world_size: int | None = None
    """Ranks in each pipeline stage; None where the layout knows no ranks."""
    parts: tuple[RankFiles, ...] = ()
    """The ranks that have files, in order."""
    num_files: int = 0
    """Files of the checkpoint that are there, damaged ones too."""
    num_tensors: int = 0
    """In all its valid files; a tensor that several ranks hold counts for each."""
    nbytes: int = 0
    """Of these tensors."""
    dtypes: tuple[DtypeUse, ...] = ()
    """By bytes, the most first."""
    missing_files: tuple[str, ...] = ()
    """The first of the files that should be there; ``*`` stands for parts of an unknown number."""
    num_missing_files: int = 0
    extra_files: tuple[str, ...] = ()
    """Files of tensors that are not part of the checkpoint."""
    copies: tuple[str, ...] = ()
    """Those of the extra files that look like the same weights once more."""
    damaged: tuple[DamagedFile, ...] = ()
    """Files that are there and cannot be read, extra ones too."""
    ties: tuple[Tie, ...] = ()
    """Tied tensors, by the files' metadata or by ``tie_word_embeddings`` in ``config.json``."""

    @property
    def is_ok(self) -> bool:
        """Whether there is no problem at all."""
        return not self.problems

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have files."""
        return tuple(sorted({own.rank for own in self.parts}))

    @property
    def pp_ranks(self) -> tuple[int, ...]:
        """The pipeline stages that have files."""
        return tuple(sorted({own.pp_rank for own in self.parts}))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.path}: {_KINDS[self.layout]}, {self._verdict()}"
        if self.parts:
            counts = sorted({own.parts for own in self.parts})
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
