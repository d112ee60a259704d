"""The save that a rank's file comes from, in a header's own ``__metadata__``.

The value of the key `SAVE_KEY` is the id of one save of one rank, 32 lower-case hexadecimal digits, a space, and the
number of files that the save wrote: ``"0f3c... 4"``. All files of a rank have the same value. A program that writes a
part of such files anew must drop the key from all of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

SAVE_KEY = "asyncshard.save"
STEP_KEY = "step"
"""Under which callers may tell the training step of what they save."""

_VALUE = re.compile(r"([0-9a-f]{32}) ([1-9][0-9]{0,17})")


class SaveId(NamedTuple):
    """One save of one rank."""

    id: str
    parts: int | None
    """Files that it wrote; None where the text does not tell."""

    def __str__(self) -> str:
        return f"{self.id} {self.parts}"


def save_id_of(metadata: Mapping[str, str]) -> SaveId | None:
    """Return the save that a file's metadata names, None where it names none. A text of another form counts whole."""
    text = metadata.get(SAVE_KEY)
    if text is None:
        return None
    match = _VALUE.fullmatch(text)
    return SaveId(text, None) if match is None else SaveId(match[1], int(match[2]))
