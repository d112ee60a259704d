"""What a checkpoint's path is, and which of its files are read in which order: decided from file names alone.

A directory is one of these, looked for in this order:

``ranks``
    rank shards, ``model-rank-{rank}-part-{part}.safetensors`` (:mod:`asyncshard.format.pattern`): this rank's files,
    by number of part. An explicit pattern allows nothing else.
``index``
    a Hugging Face checkpoint, whose ``model.safetensors.index.json`` names the shards.
``single``
    one ``model.safetensors``, or the file that the path itself names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import ShardName, ShardPattern
from asyncshard.plan.division.chunks import whole_number
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME, incomplete, incomplete_rank, marked_ranks
from asyncshard.plan.files.rank_shards import KNOWN_PATTERNS, faults_of_rank, find_rank_shards, two_patterns
from asyncshard.plan.text import count_of, enumerate_names

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

NUMBERED = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{1,18})-of-(?P<count>[0-9]{1,18})\.safetensors", re.DOTALL)
"""The names of one file of several."""

_SHOWN = 10  # how many files it shows of those that are there


@dataclass(frozen=True, slots=True)
class Layout:
    """What a path turned out to be."""

    kind: Literal["ranks", "index", "single"]
    """Which of the layouts."""
    files: tuple[str, ...]
    """Names of the files to open, in delivery order; of an index the index alone, see :func:`index_files`."""


def validate_rank(rank: int, world_size: int, pp_rank: int = 0) -> None:
    """Check that ``0 <= rank < world_size`` and ``0 <= pp_rank``, all whole numbers.

    Raises
    ------
    ValueError
        They are not.
    """
    whole_number(world_size, "world_size", minimum=1)
    whole_number(rank, "rank", minimum=0)
    whole_number(pp_rank, "pp_rank", minimum=0)
    if rank >= world_size:
        raise ValueError(f"rank {rank} is outside the world of {world_size} ranks, which count from 0")


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that puts numbers within names in numeric order: ``part-2`` before ``part-10``.

    Different names have different keys: equal numbers with more zeros are told apart by plain order.
    """
    # Texts and numbers alternate, so that like meets like; a longer number without leading zeros is the greater.
    pieces = re.split("([0-9]+)", name)
    key = []
    for place, piece in enumerate(pieces):
        digits = piece.lstrip("0")
        key.append((len(digits), digits) if place % 2 else (0, piece))
    return key, name


def choose_layout(
    names: Sequence[str],
    *,
    path: str,
    is_file: bool = False,
    pattern: ShardPattern | None = None,
    rank: int = 0,
    world_size: int = 1,
    pp_rank: int = 0,
) -> Layout:
    """Decide what a path is and which files to open.

    Parameters
    ----------
    names : sequence of str
        The files directly in the directory, or the one file that ``path`` names.
    path : str
        The path that the user gave, for messages.
    is_file : bool
        Whether ``path`` names a file.
    pattern : ShardPattern, optional
        Look for these rank shards and nothing else. Without one, both of vLLM's patterns are tried.
    rank, world_size, pp_rank : int
        Whose rank shards; they do not matter to the other layouts.

    Raises
    ------
    ObjectNotFoundError
        There is no checkpoint, or none of this rank.
    CheckpointError
        `reshard` has left it incomplete, or a save has left this rank so, parts are missing, two names mean the same
        part, the set is of a larger world than ``world_size``, both patterns occur, or a pattern was given for a single
        file.
    ValueError
        The ranks are out of range, or ``names`` is not one name where ``path`` is a file.
    """
    validate_rank(rank, world_size, pp_rank)
    if is_file:
        if len(names) != 1:
            raise ValueError(f"{path} is a file: expected its one name, got {len(names)}")
        if pattern is not None:
            raise CheckpointError(
                f"{path} is a file, but the pattern {pattern.template!r} asks for a directory of rank shards: pass the "
                "directory, or leave the pattern out.",
                path=path,
            )
        return Layout("single", tuple(names))
    if INCOMPLETE_NAME in names:
        raise incomplete(path)
    for mark, own in marked_ranks(names, KNOWN_PATTERNS if pattern is None else (pattern,)):
        if own[:2] == (pp_rank, rank):
            raise incomplete_rank(path, mark, own)
    matches = find_rank_shards(names, path, pattern)
    if len(matches) > 1:
        raise two_patterns(path)
    if matches:
        (shards,) = matches
        own = ShardName(pp_rank, rank, 0)
        for fault in faults_of_rank(shards, own, world_size):
            raise fault
        return Layout("ranks", tuple(shards.parts_of(own).values()))
    if pattern is None and INDEX_NAME in names:
        return Layout("index", (INDEX_NAME,))
    if pattern is None and SINGLE_NAME in names:
        return Layout("single", (SINGLE_NAME,))
    raise nothing_found(names, path, pattern)


def is_rank_shard(name: str, pattern: ShardPattern | None = None) -> bool:
    """Return whether a file is by its name a shard of one rank: of this pattern, or of one of vLLM's."""
    return any(known.parse(name) is not None for known in (KNOWN_PATTERNS if pattern is None else (pattern,)))


def is_one_of_several(name: str, pattern: ShardPattern | None = None) -> bool:
    """Return whether a file is by its name one of those that make up a checkpoint."""
    return NUMBERED.fullmatch(name) is not None or is_rank_shard(name, pattern)


def is_whole_model(layout: Layout, *, is_file: bool, pattern: ShardPattern | None = None) -> bool:
    """Return whether files hold all that a model has on a rank: neither one file of several nor a pipeline stage."""
    name = layout.files[0]
    if is_file:
        return not is_one_of_several(name, pattern)
    patterns = KNOWN_PATTERNS if pattern is None else (pattern,)
    return layout.kind != "ranks" or not any(each.has_pp_rank and each.parse(name) is not None for each in patterns)


def index_files(weight_map_files: Iterable[str], names: Iterable[str], path: str) -> tuple[str, ...]:
    """Order the shards that an index names: ``model-00002-of-00010`` before ``model-00010-of-00010``.

    Parameters
    ----------
    weight_map_files : iterable of str
        The files of its ``weight_map``, in any order, as often as they occur there.
    names : iterable of str
        The files directly in the directory. A shard in a folder below it cannot be looked for here and is let pass.
    path : str
        The path that the user gave, for messages.

    Raises
    ------
    ObjectNotFoundError
        The index names files that are not there.
    """
    files = sorted(set(weight_map_files), key=natural_key)
    absent = absent_files(files, names)
    if absent:
        raise files_not_found(absent, path)
    return tuple(files)


def absent_files(files: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the files that an index names and the directory's `names` lack, in the order of `files`."""
    present = set(names)
    return [name for name in files if name not in present and "/" not in name]


def files_not_found(absent: Sequence[str], path: str) -> ObjectNotFoundError:
    """Return the error for files that only the index knows."""
    return ObjectNotFoundError(
        f"{path}: {INDEX_NAME} names {count_of(len(absent), 'file')} that the directory lacks: "
        f"{enumerate_names(absent)}. Download them, or mend the index.",
        path=path,
    )


def nothing_found(names: Sequence[str], path: str, pattern: ShardPattern | None) -> ObjectNotFoundError:
    """Return the error for a directory that holds none of the layouts."""
    if pattern is None:
        templates = " or ".join(known.template for known in KNOWN_PATTERNS)
        wanted = f"{templates}, {INDEX_NAME} or {SINGLE_NAME}"
    else:
        wanted = pattern.template
    others = sorted((name for name in set(names) if name.endswith(".safetensors")), key=natural_key)
    there = f"has {enumerate_names(others, _SHOWN)}" if others else "has no .safetensors file"
    return ObjectNotFoundError(f"{path} holds no checkpoint: looked for {wanted}; the directory {there}.", path=path)
