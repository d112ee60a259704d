"""The rank shards among the names of a directory, and what their names alone tell to be wrong.

Each fault is an error, made and not raised: who loads raises the first, who checks lists them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import DEFAULT_TEMPLATE, PP_TEMPLATE, ShardName, ShardPattern
from asyncshard.plan.text import LISTED, count_of, enumerate_names, ranks_of

KNOWN_PATTERNS = (ShardPattern(DEFAULT_TEMPLATE), ShardPattern(PP_TEMPLATE))

Fault = CheckpointError | ObjectNotFoundError


@dataclass(frozen=True, slots=True)
class RankShards:
    """The files that follow one pattern."""

    pattern: ShardPattern
    names: dict[str, ShardName]
    """What the name of each file says; never empty."""
    path: str
    """The path that the user gave, for messages."""

    @property
    def owners(self) -> list[ShardName]:
        """Every rank of every pipeline stage that has a file, in order, as the name of its part 0."""
        return [ShardName(*own, 0) for own in sorted({shard[:2] for shard in self.names.values()})]

    def parts_of(self, own: ShardName) -> dict[int, str]:
        """Return the files of one rank by number of part, in order."""
        parts = {shard.part: name for name, shard in self.names.items() if shard[:2] == own[:2]}
        return dict(sorted(parts.items()))

    def by_owner(self) -> dict[ShardName, dict[int, str]]:
        """Return `parts_of` of all owners, in order."""
        found: dict[ShardName, dict[int, str]] = {own: {} for own in self.owners}
        for name, shard in sorted(self.names.items(), key=lambda item: item[1]):
            found[ShardName(*shard[:2], 0)][shard.part] = name
        return found

    def called(self, own: ShardName) -> str:
        """Return what messages call a rank."""
        if self.pattern.has_pp_rank or own.pp_rank:
            return f"pp_rank {own.pp_rank} rank {own.rank}"
        return f"rank {own.rank}"


def find_rank_shards(names: Sequence[str], path: str, pattern: ShardPattern | None) -> list[RankShards]:
    """Find the pattern that the names follow: the given one, or the known ones that any name follows."""
    matches = []
    for candidate in KNOWN_PATTERNS if pattern is None else (pattern,):
        shards = {name: shard for name in names if (shard := candidate.parse(name)) is not None}
        if shards:
            matches.append(RankShards(candidate, shards, path))
    return matches


def two_patterns(path: str) -> CheckpointError:
    """Return the error for a directory in which names follow both patterns."""
    return CheckpointError(
        f"{path} holds rank shards of two checkpoints, {KNOWN_PATTERNS[0].template} and "
        f"{KNOWN_PATTERNS[1].template}: pass the pattern of the one to load.",
        path=path,
    )


def faults_of_rank(shards: RankShards, own: ShardName, world_size: int) -> Iterator[Fault]:
    """Yield what keeps one rank from being loaded, the most basic first."""
    yield from faults_of_world(shards, world_size)
    parts = shards.parts_of(own)
    if parts:
        yield from faults_of_parts(shards, own, parts)
    else:
        yield _rank_not_found(shards, own)


def faults_of_world(shards: RankShards, world_size: int) -> Iterator[Fault]:
    """Yield what is wrong with the set, whichever rank is to be loaded."""
    ranks = sorted({shard.rank for shard in shards.names.values()})
    outside = [rank for rank in ranks if rank >= world_size]
    if outside:
        yield CheckpointError(
            f"{shards.path} holds files of {ranks_of(outside)}, outside a world of {world_size}: pass the world_size "
            "that the checkpoint was written with.",
            path=shards.path,
        )
    by_shard: dict[ShardName, list[str]] = {}
    for name, shard in shards.names.items():
        by_shard.setdefault(shard, []).append(name)
    twice = [sorted(names) for _, names in sorted(by_shard.items()) if len(names) > 1]
    if twice:
        groups = [" and ".join(names) for names in twice]
        yield CheckpointError(
            f"{shards.path} holds more than one file for the same rank and part: {enumerate_names(groups)}. Remove the "
            "ones that do not belong.",
            path=shards.path,
        )


def faults_of_parts(shards: RankShards, own: ShardName, parts: Iterable[int]) -> Iterator[Fault]:
    """Yield the gap in the parts of a rank, of which `parts` are there."""
    present = sorted(parts)
    first, total = gaps(present, present[-1] + 1)
    if total:
        yield CheckpointError(
            f"{shards.path}: {shards.called(own)} lacks {count_of(total, 'part')} of 0 to {present[-1]}: "
            f"{enumerate_names([str(part) for part in first], total=total)}. The checkpoint is incomplete.",
            path=shards.path,
        )


def absent_ranks(shards: RankShards, world_size: int) -> Iterator[tuple[int, list[int], int]]:
    """Yield the pipeline stages in which ranks of the world have no file, the first of these, and how many they are."""
    for stage, ranks in _stages(shards).items():
        first, total = gaps([rank for rank in ranks if rank < world_size], world_size)
        if total:
            yield stage, first, total


def missing_ranks(shards: RankShards, world_size: int) -> Iterator[Fault]:
    """Yield what `absent_ranks` finds, and the pipeline stages that have no file at all."""
    for stage, first, total in absent_ranks(shards, world_size):
        where = f"pp_rank {stage} has" if shards.pattern.has_pp_rank else "there is"
        yield CheckpointError(
            f"{shards.path}: {where} no file of {ranks_of(first, total)}, in a world of {world_size}. "
            "The checkpoint is incomplete.",
            path=shards.path,
        )
    stages = list(_stages(shards))
    first, total = gaps(stages, stages[-1] + 1)
    if total:
        listed = enumerate_names([str(stage) for stage in first], total=total)
        yield CheckpointError(
            f"{shards.path}: there is no file of pp_rank {listed}, though there are files of pp_rank {stages[-1]}. "
            "The checkpoint is incomplete.",
            path=shards.path,
        )


def _stages(shards: RankShards) -> dict[int, list[int]]:
    """Return the ranks of each pipeline stage that have a file, in order."""
    stages: dict[int, list[int]] = {}
    for own in shards.owners:
        stages.setdefault(own.pp_rank, []).append(own.rank)
    return stages


def gaps(present: Sequence[int], count: int) -> tuple[list[int], int]:
    """Return the first of the numbers below `count` that are not in `present`, which is sorted, and how many there are.

    Lazily: one stray name may stand for 10**18 that are missing.
    """
    between = (range(before + 1, after) for before, after in zip([-1, *present], [*present, count], strict=True))
    return list(islice(chain.from_iterable(between), LISTED)), count - len(present)


def _rank_not_found(shards: RankShards, own: ShardName) -> ObjectNotFoundError:
    if shards.pattern.has_pp_rank:
        pairs = [f"pp_rank {other.pp_rank} rank {other.rank}" for other in shards.owners]
        there = enumerate_names(pairs)
    else:
        there = ranks_of([other.rank for other in shards.owners])
    message = (
        f"{shards.path} holds no file of {shards.called(own)} by the pattern {shards.pattern.template!r}; "
        f"it has {there}."
    )
    if own.pp_rank and not shards.pattern.has_pp_rank:
        message += " The pattern has no {pp_rank}."
    return ObjectNotFoundError(message, path=shards.path)
