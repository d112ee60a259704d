"""Which files a whole checkpoint should have, which there are and which are too many: decided from names alone.

Where `asyncshard.plan.files.layout` chooses the files of one rank and raises the first fault, this lists the files of
all ranks and every fault.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME, incomplete, incomplete_rank, marked_ranks
from asyncshard.plan.files.layout import (
    INDEX_NAME,
    NUMBERED,
    SINGLE_NAME,
    absent_files,
    files_not_found,
    natural_key,
    nothing_found,
)
from asyncshard.plan.files.rank_shards import (
    KNOWN_PATTERNS,
    RankShards,
    absent_ranks,
    faults_of_parts,
    faults_of_world,
    find_rank_shards,
    gaps,
    missing_ranks,
    two_patterns,
)
from asyncshard.plan.text import count_of, enumerate_names

Kind = Literal["ranks", "index", "single", "shards"]

_CONSOLIDATED = re.compile(r"consolidated.*\.safetensors", re.DOTALL)


class Group(NamedTuple):
    """Files that are loaded together, in order."""

    label: str
    """``rank 0``; empty where the layout knows no ranks."""
    files: tuple[str, ...]
    pp_rank: int = 0
    rank: int = 0
    template: str = ""
    """Of the pattern that the names of rank shards follow."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the names say."""

    kind: Kind | None
    """The layout; None where there is no checkpoint. ``shards`` are numbered ones without the index that they need."""
    groups: tuple[Group, ...] = ()
    """The files that make up the checkpoint."""
    missing: tuple[str, ...] = ()
    """The first of the files that should be there; ``*`` stands for parts of an unknown number."""
    num_missing: int = 0
    others: tuple[str, ...] = ()
    """Files of tensors that are not part of it."""
    copies: tuple[str, ...] = ()
    """Those of the others that look like the same weights once more."""
    faults: tuple[str, ...] = ()
    """Sentences; each says of something that it is missing or contradicts something else."""
    world_size: int | None = None
    """Ranks in each pipeline stage; None where the layout knows no ranks."""

    @property
    def files(self) -> tuple[str, ...]:
        """All files of the checkpoint."""
        return tuple(name for group in self.groups for name in group.files)


def survey_names(
    names: Sequence[str],
    *,
    path: str,
    is_file: bool = False,
    pattern: ShardPattern | None = None,
    world_size: int | None = None,
) -> Survey:
    """Survey a directory, or the one file that ``path`` names.

    Of a directory with an index the files are not known yet: see `survey_index`.

    Parameters
    ----------
    names : sequence of str
        The files directly in the directory, or the one file.
    path : str
        The path that the user gave, for messages.
    pattern : ShardPattern, optional
        Look for these rank shards and nothing else.
    world_size : int, optional
        Of the ranks; by default as many as the names show.
    """
    if is_file:
        return Survey("single", (Group("", tuple(names)),))
    if INCOMPLETE_NAME in names:
        return _with_others(Survey(None, faults=(str(incomplete(path)),)), names)
    matches = find_rank_shards(names, path, pattern)
    if matches:
        survey = _survey_ranks(matches, path, world_size)
    elif pattern is None and INDEX_NAME in names:
        return Survey("index")
    elif pattern is None and SINGLE_NAME in names:
        survey = Survey("single", (Group("", (SINGLE_NAME,)),))
    else:
        survey = _survey_numbered(names, path, pattern)
    marks = marked_ranks(names, KNOWN_PATTERNS if pattern is None else (pattern,))
    faults = [str(incomplete_rank(path, mark, own)) for mark, own in marks]
    return _with_others(replace(survey, faults=(*faults, *survey.faults)), names)


def survey_index(files: Iterable[str], names: Sequence[str], *, path: str) -> Survey:
    """Survey a directory by the files that its index names."""
    ordered = sorted(set(files), key=natural_key)
    absent = absent_files(ordered, names)
    gone = set(absent)
    index_path = f"{path.rstrip('/')}/{INDEX_NAME}"
    faults = [str(files_not_found(absent, index_path))] if absent else []
    if not ordered:
        faults.append(f"{index_path} names no tensor. Fetch it again, or write it anew.")
    return _with_others(
        Survey(
            "index",
            (Group("", tuple(name for name in ordered if name not in gone)),),
            tuple(absent),
            len(absent),
            faults=tuple(faults),
        ),
        names,
    )


def _survey_ranks(matches: Sequence[RankShards], path: str, world_size: int | None) -> Survey:
    groups: list[Group] = []
    missing: list[str] = []
    num_missing = 0
    faults = [str(two_patterns(path))] if len(matches) > 1 else []
    world = 0
    for shards in matches:
        size = max(own.rank for own in shards.owners) + 1 if world_size is None else world_size
        world = max(world, size)
        faults += map(str, faults_of_world(shards, size))
        faults += map(str, missing_ranks(shards, size))
        for stage, absent, total in absent_ranks(shards, size):
            missing += [shards.pattern.format_for_rank(rank, "*", stage) for rank in absent]
            num_missing += total
        for own, parts in shards.by_owner().items():
            label = shards.called(own)
            groups.append(Group(label, tuple(parts.values()), own.pp_rank, own.rank, shards.pattern.template))
            faults += map(str, faults_of_parts(shards, own, parts))
            first, total = gaps(list(parts), max(parts) + 1)
            missing += [shards.pattern.format_for_rank(own.rank, part, own.pp_rank) for part in first]
            num_missing += total
    return Survey("ranks", tuple(groups), tuple(missing), num_missing, (), (), tuple(faults), world)


def _survey_numbered(names: Sequence[str], path: str, pattern: ShardPattern | None) -> Survey:
    """Survey what has neither ranks nor an index nor the one name: the largest set of numbered shards, if any."""
    fault = str(nothing_found(names, path, pattern))
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(names, key=natural_key) if pattern is None else ():
        if match := NUMBERED.fullmatch(name):
            sets.setdefault((match["prefix"], match["count"]), {})[int(match["number"])] = name
    if not sets:
        return Survey(None, faults=(fault,))
    (prefix, count), shards = max(sets.items(), key=lambda item: len(item[1]))
    numbers = [number - 1 for number in shards if 0 < number <= int(count)]
    first, total = gaps(sorted(numbers), int(count))
    missing = [f"{prefix}-{number + 1:0{len(count)}}-of-{count}.safetensors" for number in first]
    faults = [f"{fault} They are shards without their {INDEX_NAME}: download it."]
    if total:
        faults.append(
            f"{path}: of the {int(count)} shards, {count_of(total, 'file')} {'is' if total == 1 else 'are'} missing: "
            f"{enumerate_names(missing, total=total)}. Download them."
        )
    return Survey("shards", (Group("", tuple(shards.values())),), tuple(missing), total, faults=tuple(faults))


def _with_others(survey: Survey, names: Sequence[str]) -> Survey:
    own = set(survey.files)
    others = sorted({name for name in names if name.endswith(".safetensors")} - own, key=natural_key)
    copies = tuple(name for name in others if survey.kind is not None and _is_copy(name))
    return replace(survey, others=tuple(others), copies=copies)


def _is_copy(name: str) -> bool:
    return (
        name == SINGLE_NAME
        or _CONSOLIDATED.fullmatch(name) is not None
        or NUMBERED.fullmatch(name) is not None
        or any(known.parse(name) is not None for known in KNOWN_PATTERNS)
    )
