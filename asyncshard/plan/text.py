"""Counts and lists of things in messages, shortened where there are very many of them."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import CheckpointError

LISTED = 20
"""A message lists at most 20 names or problems."""


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1: ``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def enumerate_names(
    names: Sequence[str],
    limit: int = LISTED,
    total: int | None = None,
    *,
    is_quoted: bool = False,
    separator: str = ", ",
) -> str:
    """Return the first `limit` names and the number of those left out, such as ``a, b and 3 more``.

    Parameters
    ----------
    total : int, optional
        The number of all names, if `names` holds only the first of them.
    is_quoted : bool
        Whether each name is shown as its repr.
    separator : str
        The text between two names.
    """
    shown = names[:limit]
    rest = (len(names) if total is None else total) - len(shown)
    return separator.join(map(repr, shown) if is_quoted else shown) + (f" and {rest} more" if rest else "")


def ranks_of(ranks: Sequence[int], total: int | None = None) -> str:
    """Return ranks with their noun, such as ``rank 0`` or ``ranks 0, 2``.

    `total` is the number of all ranks, if `ranks` holds only the first of them.
    """
    is_one = (len(ranks) if total is None else total) == 1
    return ("rank " if is_one else "ranks ") + enumerate_names(
        [str(rank) for rank in ranks[:LISTED]], total=total or len(ranks)
    )


class Problems:
    """Problems that keep a checkpoint from being resharded, collected to be raised as one error."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._texts: list[str] = []
        self._count = 0

    def add(self, text: str) -> None:
        """Add a problem, as one sentence."""
        self._count += 1
        if len(self._texts) < LISTED:
            self._texts.append(text)

    def require_none(self) -> None:
        """Raise CheckpointError if a problem was added."""
        if self._count:
            listed = enumerate_names(self._texts, total=self._count, separator="\n  ")
            raise CheckpointError(
                f"{self._path}: the checkpoint cannot be resharded, and nothing was written:\n  {listed}",
                path=self._path,
            )
