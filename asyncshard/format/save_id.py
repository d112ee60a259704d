"""The id of the save that wrote a rank's file, stored in the ``__metadata__`` of its header.

The value of the key `SAVE_KEY` has 32 lower-case hexadecimal digits, which identify one save of one rank, a space, and
the number of files that the save wrote: ``"0f3c... 4"``. All files of a rank have the same value. A program that
rewrites only some of these files must drop the key from all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

SAVE_KEY = "asyncshard.save"
STEP_KEY = "step"
"""The key under which callers may store the training step of a saved checkpoint."""

_VALUE = re.compile(r"([0-9a-f]{32}) ([1-9][0-9]{0,17})")


class SaveId(NamedTuple):
    """The identity of one save of one rank."""

    id: str
    """32 hexadecimal digits, or the whole value if it has another form."""
    parts: int | None
    """The number of files that the save wrote; None if the value has another form."""

    def __str__(self) -> str:
        return f"{self.id} {self.parts}"


def save_id_of(metadata: Mapping[str, str]) -> SaveId | None:
    """Return the save that the metadata of a file names, or None. A value of another form is taken as the id."""
    text = metadata.get(SAVE_KEY)
    if text is None:
        return None
    match = _VALUE.fullmatch(text)
    return SaveId(text, None) if match is None else SaveId(match[1], int(match[2]))
