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
from itertools import chain, islice
from typing import Literal

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import DEFAULT_TEMPLATE, PP_TEMPLATE, ShardName, ShardPattern
from asyncshard.plan.sharding import whole_number

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
INCOMPLETE_NAME = "asyncshard.incomplete"
"""A file that stands in a directory for as long as it is being written by `reshard`."""

_KNOWN_PATTERNS = (ShardPattern(DEFAULT_TEMPLATE), ShardPattern(PP_TEMPLATE))
_LISTED = 20  # how many faults a message names
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
        A reshard has left it incomplete, parts are missing, two names mean the same part, the set is of a larger world than ``world_size``, both patterns
        occur, or a pattern was given for a single file.
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
        raise CheckpointError(
            f"{path} is incomplete: a reshard into it was stopped, or has not ended yet. Run reshard again, or wait "
            "for it.",
            path=path,
        )
    matched = rank_shards(names, path, pattern)
    if matched is not None:
        found, shards = matched
        own = ShardName(pp_rank, rank, 0)
        return Layout("ranks", _rank_files(shards, own, world_size, path=path, pattern=found))
    if pattern is None and INDEX_NAME in names:
        return Layout("index", (INDEX_NAME,))
    if pattern is None and SINGLE_NAME in names:
        return Layout("single", (SINGLE_NAME,))
    raise _nothing_found(names, path, pattern)


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
    present = set(names)
    absent = [name for name in files if name not in present and "/" not in name]
    if absent:
        raise ObjectNotFoundError(
            f"{path}: {INDEX_NAME} names {_count(len(absent), 'file')} that the directory lacks: "
            f"{_listing(absent, _LISTED)}. Download them, or mend the index.",
            path=path,
        )
    return tuple(files)


def rank_shards(
    names: Sequence[str], path: str, pattern: ShardPattern | None
) -> tuple[ShardPattern, dict[str, ShardName]] | None:
    """Find the pattern that the names of rank shards follow, and what each says; None if there are no such names.

    Raises
    ------
    CheckpointError
        There are names of two patterns.
    """
    matches = []
    for candidate in _KNOWN_PATTERNS if pattern is None else (pattern,):
        shards = {name: shard for name in names if (shard := candidate.parse(name)) is not None}
        if shards:
            matches.append((candidate, shards))
    if len(matches) > 1:
        raise CheckpointError(
            f"{path} holds rank shards of two checkpoints, {_KNOWN_PATTERNS[0].template} and "
            f"{_KNOWN_PATTERNS[1].template}: pass the pattern of the one to load.",
            path=path,
        )
    return matches[0] if matches else None


def _rank_files(
    shards: dict[str, ShardName], own: ShardName, world_size: int, *, path: str, pattern: ShardPattern
) -> tuple[str, ...]:
    """Return the files of one rank by number of part, after checking what can be told from the names."""
    ranks = sorted({shard.rank for shard in shards.values()})
    outside = [rank for rank in ranks if rank >= world_size]
    if outside:
        raise CheckpointError(
            f"{path} holds files of {_ranks(outside)}, outside a world of {world_size}: pass the world_size that the "
            "checkpoint was written with.",
            path=path,
        )
    _check_duplicates(shards, path)
    parts = {shard.part: name for name, shard in shards.items() if shard[:2] == own[:2]}
    if not parts:
        raise _rank_not_found(shards, own, path, pattern)
    _check_gaps(parts, own, path, pattern)
    return tuple(parts[part] for part in sorted(parts))


def _check_duplicates(shards: dict[str, ShardName], path: str) -> None:
    by_shard: dict[ShardName, list[str]] = {}
    for name, shard in shards.items():
        by_shard.setdefault(shard, []).append(name)
    twice = [sorted(names) for _, names in sorted(by_shard.items()) if len(names) > 1]
    if twice:
        groups = [" and ".join(names) for names in twice]
        raise CheckpointError(
            f"{path} holds more than one file for the same rank and part: {_listing(groups, _LISTED)}. Remove the "
            "ones that do not belong.",
            path=path,
        )


def _check_gaps(parts: dict[int, str], own: ShardName, path: str, pattern: ShardPattern) -> None:
    present = sorted(parts)
    num_missing = present[-1] + 1 - len(present)
    if not num_missing:
        return
    # Lazily: one stray name may stand for 10**18 missing parts.
    gaps = (range(before + 1, after) for before, after in zip([-1, *present], present, strict=False))
    listed = [str(part) for part in islice(chain.from_iterable(gaps), _LISTED)]
    raise CheckpointError(
        f"{path}: {_owner(own, pattern)} lacks {_count(num_missing, 'part')} of 0 to {present[-1]}: "
        f"{_listing(listed, _LISTED, num_missing)}. The checkpoint is incomplete.",
        path=path,
    )


def _rank_not_found(
    shards: dict[str, ShardName], own: ShardName, path: str, pattern: ShardPattern
) -> ObjectNotFoundError:
    if pattern.has_pp_rank:
        pairs = sorted({shard[:2] for shard in shards.values()})
        there = _listing([f"pp_rank {pp_rank} rank {rank}" for pp_rank, rank in pairs], _LISTED)
    else:
        there = _ranks(sorted({shard.rank for shard in shards.values()}))
    message = f"{path} holds no file of {_owner(own, pattern)} by the pattern {pattern.template!r}; it has {there}."
    if own.pp_rank and not pattern.has_pp_rank:
        message += " The pattern has no {pp_rank}."
    return ObjectNotFoundError(message, path=path)


def _nothing_found(names: Sequence[str], path: str, pattern: ShardPattern | None) -> ObjectNotFoundError:
    if pattern is None:
        templates = " or ".join(known.template for known in _KNOWN_PATTERNS)
        wanted = f"{templates}, {INDEX_NAME} or {SINGLE_NAME}"
    else:
        wanted = pattern.template
    others = sorted((name for name in set(names) if name.endswith(".safetensors")), key=natural_key)
    there = f"has {_listing(others, _SHOWN)}" if others else "has no .safetensors file"
    return ObjectNotFoundError(f"{path} holds no checkpoint: looked for {wanted}; the directory {there}.", path=path)


def _owner(own: ShardName, pattern: ShardPattern) -> str:
    if pattern.has_pp_rank or own.pp_rank:
        return f"pp_rank {own.pp_rank} rank {own.rank}"
    return f"rank {own.rank}"


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + _listing([str(rank) for rank in ranks], _LISTED)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listing(texts: Sequence[str], limit: int, total: int | None = None) -> str:
    shown = texts[:limit]
    rest = (len(texts) if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
