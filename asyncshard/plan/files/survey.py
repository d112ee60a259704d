"""Which files a whole checkpoint should have, which exist, and which do not belong to it: decided from names alone.

Where `asyncshard.plan.files.layout` chooses the files of one rank and raises the first problem, this lists the files of
all ranks and every problem.
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
    find_rank_shards,
    gaps,
    missing_ranks,
    problems_of_parts,
    problems_of_world,
    two_patterns,
)
from asyncshard.plan.text import count_of, enumerate_names

Kind = Literal["ranks", "index", "single", "shards"]

_CONSOLIDATED = re.compile(r"consolidated.*\.safetensors", re.DOTALL)


class Group(NamedTuple):
    """The files that one rank loads, or all files of a checkpoint that has no ranks."""

    label: str
    """The text by which messages call the rank, such as ``rank 0``; empty for a layout without ranks."""
    files: tuple[str, ...]
    """The names of the files, in delivery order."""
    pp_rank: int = 0
    rank: int = 0
    template: str = ""
    """The template of the pattern of rank shards; empty for other layouts."""


@dataclass(frozen=True, slots=True)
class Survey:
    """The files of a directory, sorted into those of the checkpoint, missing ones and others."""

    kind: Kind | None
    """The layout; None if there is no checkpoint. ``shards`` means numbered shards whose index is missing."""
    groups: tuple[Group, ...] = ()
    """The files that make up the checkpoint."""
    missing: tuple[str, ...] = ()
    """The first of the missing files; ``*`` stands for the parts of a rank whose number of parts is unknown."""
    num_missing: int = 0
    """The number of all missing files."""
    others: tuple[str, ...] = ()
    """Safetensors files that do not belong to the checkpoint."""
    copies: tuple[str, ...] = ()
    """The files among the others that seem to hold the same weights again."""
    problems: tuple[str, ...] = ()
    """A sentence for each thing that is missing or contradicts another."""
    world_size: int | None = None
    """The number of ranks in each pipeline stage; None for a layout without ranks."""

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

    For a directory with an index the result has no files, because only the index names them: see `survey_index`.

    Parameters
    ----------
    names : sequence of str
        The names of the files directly in the directory, or of the one file.
    path : str
        The path that the user gave, for messages.
    pattern : ShardPattern, optional
        The pattern of the rank shards, which makes ``ranks`` the only allowed layout.
    world_size : int, optional
        The number of ranks; by default the highest rank in the names, plus one.
    """
    if is_file:
        return Survey("single", (Group("", tuple(names)),))
    if INCOMPLETE_NAME in names:
        return _with_others(Survey(None, problems=(str(incomplete(path)),)), names)
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
    problems = [str(incomplete_rank(path, mark, owner)) for mark, owner in marks]
    return _with_others(replace(survey, problems=(*problems, *survey.problems)), names)


def survey_index(files: Iterable[str], names: Sequence[str], *, path: str) -> Survey:
    """Survey a directory with an index, given the `files` that the index names."""
    ordered = sorted(set(files), key=natural_key)
    absent = absent_files(ordered, names)
    gone = set(absent)
    index_path = f"{path.rstrip('/')}/{INDEX_NAME}"
    problems = [str(files_not_found(absent, index_path))] if absent else []
    if not ordered:
        problems.append(f"{index_path} names no tensor. Fetch it again, or write it anew.")
    return _with_others(
        Survey(
            "index",
            (Group("", tuple(name for name in ordered if name not in gone)),),
            tuple(absent),
            len(absent),
            problems=tuple(problems),
        ),
        names,
    )


def _survey_ranks(matches: Sequence[RankShards], path: str, world_size: int | None) -> Survey:
    groups: list[Group] = []
    missing: list[str] = []
    num_missing = 0
    problems = [str(two_patterns(path))] if len(matches) > 1 else []
    world = 0
    for shards in matches:
        size = max(owner.rank for owner in shards.owners) + 1 if world_size is None else world_size
        world = max(world, size)
        problems += map(str, problems_of_world(shards, size))
        problems += map(str, missing_ranks(shards, size))
        for stage, absent, total in absent_ranks(shards, size):
            missing += [shards.pattern.format_for_rank(rank, "*", stage) for rank in absent]
            num_missing += total
        for owner, parts in shards.by_owner().items():
            label = shards.called(owner)
            groups.append(Group(label, tuple(parts.values()), owner.pp_rank, owner.rank, shards.pattern.template))
            problems += map(str, problems_of_parts(shards, owner, parts))
            first, total = gaps(list(parts), max(parts) + 1)
            missing += [shards.pattern.format_for_rank(owner.rank, part, owner.pp_rank) for part in first]
            num_missing += total
    return Survey("ranks", tuple(groups), tuple(missing), num_missing, (), (), tuple(problems), world)


def _survey_numbered(names: Sequence[str], path: str, pattern: ShardPattern | None) -> Survey:
    """Survey a directory without ranks, index and single file by its largest set of numbered shards, if it has any."""
    problem = str(nothing_found(names, path, pattern))
    sets: dict[tuple[str, str], dict[int, str]] = {}
    for name in sorted(names, key=natural_key) if pattern is None else ():
        if match := NUMBERED.fullmatch(name):
            sets.setdefault((match["prefix"], match["count"]), {})[int(match["number"])] = name
    if not sets:
        return Survey(None, problems=(problem,))
    (prefix, count), shards = max(sets.items(), key=lambda item: len(item[1]))
    numbers = [number - 1 for number in shards if 0 < number <= int(count)]
    first, total = gaps(sorted(numbers), int(count))
    missing = [f"{prefix}-{number + 1:0{len(count)}}-of-{count}.safetensors" for number in first]
    problems = [f"{problem} They are shards without their {INDEX_NAME}: download it."]
    if total:
        problems.append(
            f"{path}: of the {int(count)} shards, {count_of(total, 'file')} {'is' if total == 1 else 'are'} missing: "
            f"{enumerate_names(missing, total=total)}. Download them."
        )
    return Survey("shards", (Group("", tuple(shards.values())),), tuple(missing), total, problems=tuple(problems))


def _with_others(survey: Survey, names: Sequence[str]) -> Survey:
    chosen = set(survey.files)
    others = sorted({name for name in names if name.endswith(".safetensors")} - chosen, key=natural_key)
    copies = tuple(name for name in others if survey.kind is not None and _is_copy(name))
    return replace(survey, others=tuple(others), copies=copies)


def _is_copy(name: str) -> bool:
    return (
        name == SINGLE_NAME
        or _CONSOLIDATED.fullmatch(name) is not None
        or NUMBERED.fullmatch(name) is not None
        or any(known.parse(name) is not None for known in KNOWN_PATTERNS)
    )
