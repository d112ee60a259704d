"""How messages count and list what there may be very much of."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import CheckpointError

LISTED = 20
"""How many faults a message names."""


def count_of(number: int, noun: str) -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listing(texts: Sequence[str], limit: int = LISTED, total: int | None = None) -> str:
    """Join the first `limit` texts, and say how many more there are of `total` (by default of the texts)."""
    shown = texts[:limit]
    rest = (len(texts) if total is None else total) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def ranks_of(ranks: Sequence[int], total: int | None = None) -> str:
    """Return ``rank 0``, ``ranks 0, 2``."""
    is_one = (len(ranks) if total is None else total) == 1
    return ("rank " if is_one else "ranks ") + listing(
        [str(rank) for rank in ranks[:LISTED]], LISTED, total or len(ranks)
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
            more = f"\n  and {self._count - len(self._texts)} more" if self._count > len(self._texts) else ""
            listed = "".join(f"\n  {text}" for text in self._texts)
            raise CheckpointError(
                f"{self._path}: the checkpoint cannot be resharded, and nothing was written:{listed}{more}",
                path=self._path,
            )
