"""All that is wrong with a checkpoint, in one error."""

from __future__ import annotations

from asyncshard.errors import CheckpointError
from asyncshard.plan.listing import LISTED


class Faults:
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
