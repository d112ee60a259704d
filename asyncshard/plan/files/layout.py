"""The layout of a checkpoint, and which of its files are read in which order: decided from file names alone.

A directory has the first of these layouts that fits its files:

``ranks``
    Rank shards, ``model-rank-{rank}-part-{part}.safetensors`` (:mod:`asyncshard.format.pattern`). One rank's files are
    read, in the order of their parts. If the caller gives a pattern, this is the only layout that is allowed.
``index``
    A Hugging Face checkpoint, whose ``model.safetensors.index.json`` names the shards.
``single``
    One ``model.safetensors``, or the file that the path names.
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
from asyncshard.plan.files.rank_shards import KNOWN_PATTERNS, find_rank_shards, problems_of_rank, two_patterns
from asyncshard.plan.text import count_of, enumerate_names

INDEX_NAME = "model.safetensors.index.json"
"""The name of the index of a Hugging Face checkpoint."""
SINGLE_NAME = "model.safetensors"
"""The name of the file of a Hugging Face checkpoint that has a single file."""

NUMBERED = re.compile(r"(?P<prefix>.*)-(?P<number>[0-9]{1,18})-of-(?P<count>[0-9]{1,18})\.safetensors", re.DOTALL)
"""The pattern of names such as ``model-00001-of-00002.safetensors``: the names of one file of several."""

_SHOWN = 10
"""An error lists at most 10 files of the directory."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of a checkpoint, and the files to open."""

    kind: Literal["ranks", "index", "single"]
    """The name of the layout."""
    files: tuple[str, ...]
    """The names of the files to open, in delivery order; for the layout ``index`` only the index itself (see
    :func:`index_files`)."""


def validate_rank(rank: int, world_size: int, pp_rank: int = 0) -> None:
    """Check that ``0 <= rank < world_size`` and ``0 <= pp_rank``, and that all are whole numbers.

    Raises
    ------
    ValueError
        One of the numbers is out of range, or not a whole number.
    """
    whole_number(world_size, "world_size", minimum=1)
    whole_number(rank, "rank", minimum=0)
    whole_number(pp_rank, "pp_rank", minimum=0)
    if rank >= world_size:
        raise ValueError(f"rank {rank} is outside the world of {world_size} ranks, which count from 0")


def natural_key(name: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key that orders names by the numbers in them: ``part-2`` comes before ``part-10``.

    Different names have different keys: names that differ only in leading zeros are ordered as texts.
    """
    # Texts and numbers alternate: like is compared with like. Of numbers without leading zeros, the longer is greater.
    key = []
    for index, text in enumerate(re.split("([0-9]+)", name)):
        digits = text.lstrip("0")
        key.append((len(digits), digits) if index % 2 else (0, text))
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
    """Return the layout of the checkpoint at a path, and the files to open.

    Parameters
    ----------
    names : sequence of str
        The names of the files directly in the directory, or of the one file that ``path`` names.
    path : str
        The path that the user gave, for messages.
    is_file : bool
        Whether ``path`` names a file.
    pattern : ShardPattern, optional
        The pattern of the rank shards, which makes ``ranks`` the only allowed layout. Without a pattern, both patterns
        of vLLM are tried.
    rank, world_size, pp_rank : int
        The rank whose shards are opened. The other layouts ignore these numbers.

    Raises
    ------
    ObjectNotFoundError
        There is no checkpoint, or no file of this rank.
    CheckpointError
        `reshard` has not finished the directory, or a save has not finished this rank; parts are missing; two names
        mean the same part; files belong to ranks outside of ``world_size``; both patterns occur; or a pattern was given
        for a single file.
    ValueError
        A rank is out of range, or ``path`` is a file and ``names`` is not one name.
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
    for mark, owner in marked_ranks(names, KNOWN_PATTERNS if pattern is None else (pattern,)):
        if owner[:2] == (pp_rank, rank):
            raise incomplete_rank(path, mark, owner)
    matches = find_rank_shards(names, path, pattern)
    if len(matches) > 1:
        raise two_patterns(path)
    if matches:
        (shards,) = matches
        owner = ShardName(pp_rank, rank, 0)
        for problem in problems_of_rank(shards, owner, world_size):
            raise problem
        return Layout("ranks", tuple(shards.parts_of(owner).values()))
    if pattern is None and INDEX_NAME in names:
        return Layout("index", (INDEX_NAME,))
    if pattern is None and SINGLE_NAME in names:
        return Layout("single", (SINGLE_NAME,))
    raise nothing_found(names, path, pattern)


def is_rank_shard(name: str, pattern: ShardPattern | None = None) -> bool:
    """Return whether a file name is that of a rank shard: by `pattern`, or by a pattern of vLLM if that is None."""
    return any(known.parse(name) is not None for known in (KNOWN_PATTERNS if pattern is None else (pattern,)))


def is_one_of_several(name: str, pattern: ShardPattern | None = None) -> bool:
    """Return whether a file name is that of one file of a checkpoint of several files."""
    return NUMBERED.fullmatch(name) is not None or is_rank_shard(name, pattern)


def is_whole_model(layout: Layout, *, is_file: bool, pattern: ShardPattern | None = None) -> bool:
    """Return whether a rank's files hold the whole model, and are neither one file of several nor a pipeline stage."""
    name = layout.files[0]
    if is_file:
        return not is_one_of_several(name, pattern)
    patterns = KNOWN_PATTERNS if pattern is None else (pattern,)
    return layout.kind != "ranks" or not any(each.has_pp_rank and each.parse(name) is not None for each in patterns)


def index_files(weight_map_files: Iterable[str], names: Iterable[str], path: str) -> tuple[str, ...]:
    """Return the shards that an index names, in order: ``model-00002-of-00010`` before ``model-00010-of-00010``.

    Parameters
    ----------
    weight_map_files : iterable of str
        The files in the ``weight_map`` of the index, in any order; a file may occur several times.
    names : iterable of str
        The names of the files directly in the directory. A shard in a subdirectory is accepted without a check.
    path : str
        The path that the user gave, for messages.

    Raises
    ------
    ObjectNotFoundError
        The index names files that are not in the directory.
    """
    files = sorted(set(weight_map_files), key=natural_key)
    absent = absent_files(files, names)
    if absent:
        raise files_not_found(absent, path)
    return tuple(files)


def absent_files(files: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return the `files` of an index that are not among the `names` of the directory, in their order."""
    present = set(names)
    return [name for name in files if name not in present and "/" not in name]


def files_not_found(absent: Sequence[str], path: str) -> ObjectNotFoundError:
    """Return the error for files that an index names and the directory lacks."""
    return ObjectNotFoundError(
        f"{path}: {INDEX_NAME} names {count_of(len(absent), 'file')} that the directory lacks: "
        f"{enumerate_names(absent)}. Download them, or mend the index.",
        path=path,
    )


def nothing_found(names: Sequence[str], path: str, pattern: ShardPattern | None) -> ObjectNotFoundError:
    """Return the error for a directory without a checkpoint."""
    if pattern is None:
        templates = " or ".join(known.template for known in KNOWN_PATTERNS)
        wanted = f"{templates}, {INDEX_NAME} or {SINGLE_NAME}"
    else:
        wanted = pattern.template
    others = sorted((name for name in set(names) if name.endswith(".safetensors")), key=natural_key)
    there = f"has {enumerate_names(others, _SHOWN)}" if others else "has no .safetensors file"
    return ObjectNotFoundError(f"{path} holds no checkpoint: looked for {wanted}; the directory {there}.", path=path)
