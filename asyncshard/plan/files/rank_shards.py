"""The rank shards among the files of a directory, and the problems that their names alone show.

Each problem is an error that is returned, not raised: a load raises the first one, a check lists them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import DEFAULT_TEMPLATE, PP_TEMPLATE, ShardName, ShardPattern
from asyncshard.plan.text import LISTED, count_of, enumerate_names, ranks_of

KNOWN_PATTERNS = (ShardPattern(DEFAULT_TEMPLATE), ShardPattern(PP_TEMPLATE))
"""The patterns of vLLM, which are tried if the caller gives none."""

LayoutError = CheckpointError | ObjectNotFoundError
"""A problem with the files of a checkpoint."""


@dataclass(frozen=True, slots=True)
class RankShards:
    """The rank shards of a directory whose names match one pattern."""

    pattern: ShardPattern
    names: dict[str, ShardName]
    """The numbers in each file name; never empty."""
    path: str
    """The path that the user gave, for messages."""

    @property
    def owners(self) -> list[ShardName]:
        """The ranks that have files, of all pipeline stages, in order. Each is given as the name of its part 0."""
        return [ShardName(*owner, 0) for owner in sorted({shard[:2] for shard in self.names.values()})]

    def parts_of(self, owner: ShardName) -> dict[int, str]:
        """Return the files of one rank by the number of their part, in order."""
        parts = {shard.part: name for name, shard in self.names.items() if shard[:2] == owner[:2]}
        return dict(sorted(parts.items()))

    def by_owner(self) -> dict[ShardName, dict[int, str]]:
        """Return for each of the `owners`, in order, its files by the number of their part, in order."""
        found: dict[ShardName, dict[int, str]] = {owner: {} for owner in self.owners}
        for name, shard in sorted(self.names.items(), key=lambda item: item[1]):
            found[ShardName(*shard[:2], 0)][shard.part] = name
        return found

    def called(self, owner: ShardName) -> str:
        """Return the text by which messages call a rank."""
        if self.pattern.has_pp_rank or owner.pp_rank:
            return f"pp_rank {owner.pp_rank} rank {owner.rank}"
        return f"rank {owner.rank}"


def find_rank_shards(names: Sequence[str], path: str, pattern: ShardPattern | None) -> list[RankShards]:
    """Return the rank shards by `pattern`, or by each of the known patterns; patterns without files are left out."""
    matches = []
    for candidate in KNOWN_PATTERNS if pattern is None else (pattern,):
        shards = {name: shard for name in names if (shard := candidate.parse(name)) is not None}
        if shards:
            matches.append(RankShards(candidate, shards, path))
    return matches


def two_patterns(path: str) -> CheckpointError:
    """Return the error for a directory with rank shards of both known patterns."""
    return CheckpointError(
        f"{path} holds rank shards of two checkpoints, {KNOWN_PATTERNS[0].template} and "
        f"{KNOWN_PATTERNS[1].template}: pass the pattern of the one to load.",
        path=path,
    )


def problems_of_rank(shards: RankShards, owner: ShardName, world_size: int) -> Iterator[LayoutError]:
    """Yield the problems that keep one rank from being loaded, the most basic first."""
    yield from problems_of_world(shards, world_size)
    parts = shards.parts_of(owner)
    if parts:
        yield from problems_of_parts(shards, owner, parts)
    else:
        yield _rank_not_found(shards, owner)


def problems_of_world(shards: RankShards, world_size: int) -> Iterator[LayoutError]:
    """Yield the problems that keep every rank from being loaded: ranks outside of the world, and duplicate files."""
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


def problems_of_parts(shards: RankShards, owner: ShardName, parts: Iterable[int]) -> Iterator[LayoutError]:
    """Yield the problem that a rank lacks parts below its last one; `parts` are the numbers of those that exist."""
    present = sorted(parts)
    first, total = gaps(present, present[-1] + 1)
    if total:
        yield CheckpointError(
            f"{shards.path}: {shards.called(owner)} lacks {count_of(total, 'part')} of 0 to {present[-1]}: "
            f"{enumerate_names([str(part) for part in first], total=total)}. The checkpoint is incomplete.",
            path=shards.path,
        )


def absent_ranks(shards: RankShards, world_size: int) -> Iterator[tuple[int, list[int], int]]:
    """Yield each pipeline stage in which ranks have no file, with the first of these ranks, and their number."""
    for stage, ranks in _stages(shards).items():
        first, total = gaps([rank for rank in ranks if rank < world_size], world_size)
        if total:
            yield stage, first, total


def missing_ranks(shards: RankShards, world_size: int) -> Iterator[LayoutError]:
    """Yield a problem for each pipeline stage in which ranks have no file, and one for stages without any file."""
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
    """Return for each pipeline stage, in order, the ranks that have a file."""
    stages: dict[int, list[int]] = {}
    for owner in shards.owners:
        stages.setdefault(owner.pp_rank, []).append(owner.rank)
    return stages


def gaps(present: Sequence[int], count: int) -> tuple[list[int], int]:
    """Return the first numbers below `count` that are missing in the sorted `present`, and how many are missing.

    They are not all enumerated: a single stray file name may make 10**18 of them missing.
    """
    between = (range(before + 1, after) for before, after in zip([-1, *present], [*present, count], strict=True))
    return list(islice(chain.from_iterable(between), LISTED)), count - len(present)


def _rank_not_found(shards: RankShards, owner: ShardName) -> ObjectNotFoundError:
    if shards.pattern.has_pp_rank:
        pairs = [f"pp_rank {other.pp_rank} rank {other.rank}" for other in shards.owners]
        there = enumerate_names(pairs)
    else:
        there = ranks_of([other.rank for other in shards.owners])
    message = (
        f"{shards.path} holds no file of {shards.called(owner)} by the pattern {shards.pattern.template!r}; "
        f"it has {there}."
    )
    if owner.pp_rank and not shards.pattern.has_pp_rank:
        message += " The pattern has no {pp_rank}."
    return ObjectNotFoundError(message, path=shards.path)
