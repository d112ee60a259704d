"""Whether all files of a rank come from the same save, by their metadata."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import ObjectChangedError
from asyncshard.format.save_id import SaveId
from asyncshard.plan.text import count_of

_REMEDY = "Load it again; if it stays so, save the rank again, or copy all of its files."


def save_problem(saves: Sequence[tuple[str, SaveId | None]], path: str) -> ObjectChangedError | None:
    """Return the error for a rank whose files come from several saves or are not complete, or None.

    Files without the metadata of a save are accepted if all files of the rank lack it.

    Parameters
    ----------
    saves : sequence of (str, SaveId or None)
        The name of each file of the rank, and the save that its metadata names.
    path : str
        The path that the user gave, for messages.
    """
    if not saves:
        return None
    first, expected = saves[0]
    for name, save in saves:
        if save != expected:
            return ObjectChangedError(
                f"{path}: {first} and {name} come from two saves: the rank's files are being replaced, or some of "
                f"them were. {_REMEDY}",
                path=path,
            )
    if expected is not None and expected.parts is not None and expected.parts != len(saves):
        return ObjectChangedError(
            f"{path}: {first} comes from a save of {count_of(expected.parts, 'file')}, and there "
            f"{'is' if len(saves) == 1 else 'are'} {len(saves)}: the rank's files are being replaced, or some are "
            f"missing. {_REMEDY}",
            path=path,
        )
    return None
