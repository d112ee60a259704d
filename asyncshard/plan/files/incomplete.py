"""The marks of what is being written: a directory by `reshard`, the files of one rank by `save_sharded_state`.

A mark is a file whose name says all. It stands from the moment when files begin to get their names to the moment when
all have them, and after a run that was killed between the two. Readers refuse what is marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from asyncshard.errors import CheckpointError
from asyncshard.format.pattern import ShardName, ShardPattern

INCOMPLETE_NAME = "asyncshard.incomplete"
"""A file that stands in a directory for as long as `reshard` has not ended writing it."""
_RANK_SUFFIX = ".asyncshard-incomplete"


def rank_mark(pattern: ShardPattern, rank: int, pp_rank: int) -> str:
    """Return the name of the mark of one rank: that of its part 0, with a suffix."""
    return pattern.format_for_rank(rank, 0, pp_rank) + _RANK_SUFFIX


def marked_rank(name: str, pattern: ShardPattern) -> ShardName | None:
    """Return the rank of which a file is the mark, as the name of its part 0; None if it is no mark."""
    if not name.endswith(_RANK_SUFFIX):
        return None
    shard = pattern.parse(name.removesuffix(_RANK_SUFFIX))
    return None if shard is None else shard._replace(part=0)


def marked_ranks(names: Iterable[str], patterns: Iterable[ShardPattern]) -> Iterator[tuple[str, ShardName]]:
    """Yield the marks among the names of a directory, each with its rank."""
    marks = [name for name in names if name.endswith(_RANK_SUFFIX)]
    for pattern in patterns if marks else ():
        for name in marks:
            own = marked_rank(name, pattern)
            if own is not None:
                yield name, own


def incomplete(path: str) -> CheckpointError:
    """Return the error for a directory with the mark that `reshard` removes when it has ended."""
    return CheckpointError(
        f"{path} is incomplete: it holds {INCOMPLETE_NAME}, since a reshard into it was stopped or has not ended yet. "
        "Run reshard again, or wait for it.",
        path=path,
    )


def incomplete_rank(path: str, mark: str, own: ShardName) -> CheckpointError:
    """Return the error for a rank with the mark that a save removes when it has ended; it is retryable."""
    error = CheckpointError(
        f"{path}: rank {own.rank} is incomplete: it has {mark}, since its files are being replaced at this moment, or "
        "a save was stopped while it did that. Load it again; if it stays so, save the rank again.",
        path=path,
    )
    error.retryable = True
    return error
