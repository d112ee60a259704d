"""How messages count and list what there may be very much of."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import CheckpointError

LISTED = 20
"""How many names or faults a message lists: 20."""


def count_of(number: int, noun: str) -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def enumerate_names(
    names: Sequence[str],
    limit: int = LISTED,
    total: int | None = None,
    *,
    is_quoted: bool = False,
    separator: str = ", ",
) -> str:
    """Return ``a, b and 3 more``: the first `limit` names, and how many more there are of `total`.

    Parameters
    ----------
    total : int, optional
        How many there are, where `names` are only the first of them.
    is_quoted : bool
        Whether each name is shown as its repr.
    """
    shown = names[:limit]
    rest = (len(names) if total is None else total) - len(shown)
    return separator.join(map(repr, shown) if is_quoted else shown) + (f" and {rest} more" if rest else "")


def ranks_of(ranks: Sequence[int], total: int | None = None) -> str:
    """Return ``rank 0``, ``ranks 0, 2``."""
    is_one = (len(ranks) if total is None else total) == 1
    return ("rank " if is_one else "ranks ") + enumerate_names(
        [str(rank) for rank in ranks[:LISTED]], total=total or len(ranks)
    )


class Problems:
    """What is wrong with a checkpoint, said in one error."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._texts: list[str] = []
        self._count = 0

    def add(self, text: str) -> None:
        self._count += 1
        if len(self._texts) < LISTED:
            self._texts.append(text)

    def require_none(self) -> None:
        """Raise CheckpointError if there are any."""
        if self._count:
            listed = enumerate_names(self._texts, total=self._count, separator="\n  ")
            raise CheckpointError(
                f"{self._path}: the checkpoint cannot be resharded, and nothing was written:\n  {listed}",
                path=self._path,
            )
