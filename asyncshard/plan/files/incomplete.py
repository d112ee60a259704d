"""Markers: files that mark a directory while `reshard` writes it, or a rank while `save_sharded_state` saves it.

Only the name of a marker matters. It exists from the moment when the first file gets its final name until all files
have theirs, so it stays behind if the writer is killed in between. Readers refuse what is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from asyncshard.errors import CheckpointError
from asyncshard.format.pattern import ShardName, ShardPattern

INCOMPLETE_NAME = "asyncshard.incomplete"
"""The name of the marker of a directory into which `reshard` has not finished writing."""
_RANK_SUFFIX = ".asyncshard-incomplete"
"""The end of the name of a rank's marker."""


def rank_mark(pattern: ShardPattern, rank: int, pp_rank: int) -> str:
    """Return the name of the marker of one rank: the name of its part 0, with a suffix."""
    return pattern.format_for_rank(rank, 0, pp_rank) + _RANK_SUFFIX


def marked_rank(name: str, pattern: ShardPattern) -> ShardName | None:
    """Return the rank that a file marks, as the name of the rank's part 0; None if the file is no marker."""
    if not name.endswith(_RANK_SUFFIX):
        return None
    shard = pattern.parse(name.removesuffix(_RANK_SUFFIX))
    return None if shard is None else shard._replace(part=0)


def marked_ranks(names: Iterable[str], patterns: Iterable[ShardPattern]) -> Iterator[tuple[str, ShardName]]:
    """Yield the markers among the names of a directory, each with the rank that it marks."""
    marks = [name for name in names if name.endswith(_RANK_SUFFIX)]
    for pattern in patterns if marks else ():
        for name in marks:
            owner = marked_rank(name, pattern)
            if owner is not None:
                yield name, owner


def incomplete(path: str) -> CheckpointError:
    """Return the error for a directory with the marker of `reshard`."""
    return CheckpointError(
        f"{path} is incomplete: it holds {INCOMPLETE_NAME}, since a reshard into it was stopped or has not ended yet. "
        "Run reshard again, or wait for it.",
        path=path,
    )


def incomplete_rank(path: str, mark: str, owner: ShardName) -> CheckpointError:
    """Return the error, which is retryable, for a rank with the marker of a save."""
    error = CheckpointError(
        f"{path}: rank {owner.rank} is incomplete: it has {mark}, since its files are being replaced at this moment, "
        "or a save was stopped while it did that. Load it again; if it stays so, save the rank again.",
        path=path,
    )
    error.retryable = True
    return error
