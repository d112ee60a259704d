"""Placements as text in the metadata of rank shards: they tell how the pieces of all ranks are joined again.

``asyncshard.placement``
    A JSON object with an entry for each divided tensor of the file, such as ``{"dim": 0}``. An entry has ``"pieces"``
    if there are fewer pieces than ranks, or ``"sizes"`` if several tensors are fused. A tensor without an entry is
    whole.
``asyncshard.world_size``
    The number of ranks of the checkpoint to which the file belongs.

``"pieces"`` is the largest number of pieces. If a world has fewer ranks, each rank has a piece of its own, but the
number is kept for a larger world that the checkpoint may be divided for later.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from asyncshard.errors import FormatError
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard

PLACEMENT_KEY = "asyncshard.placement"
"""The key in the metadata of the placements of a file's tensors."""
WORLD_SIZE_KEY = "asyncshard.world_size"
"""The key in the metadata of the number of ranks."""


def format_placements(placed: Iterable[tuple[str, Placement]]) -> str:
    """Return the value of `PLACEMENT_KEY` for the tensors of one file, given their names and placements."""
    known: dict[Placement, str] = {}
    entries = []
    for name, placement in placed:
        if isinstance(placement, Replicate):
            continue
        if placement not in known:
            known[placement] = json.dumps(_entry(placement), separators=(",", ":"))
        entries.append(f"{encode_basestring_ascii(name)}:{known[placement]}")
    return f"{{{','.join(entries)}}}"


def parse_placements(
    text: str, *, path: str, known: dict[str, Placement] | None = None
) -> Iterator[tuple[str, Placement]]:
    """Yield the name and the placement of each divided tensor of one file, from the value of `PLACEMENT_KEY`.

    Entries are parsed one at a time, so that a caller can release the GIL between them. `known` maps the text of an
    entry to its placement. It is filled here, and may be shared between files.

    Raises
    ------
    FormatError
        The text is not a JSON object of placements.
    """
    known = {} if known is None else known
    try:
        begin = _BEGIN.match(text)
        if begin is None:
            raise ValueError("it is no object")
        position, end = begin.end(), begin[1]
        while end != "}":
            entry = _ENTRY.match(text, position)
            if entry is None:
                raise ValueError(f"at character {position:,} there is no entry of a tensor")
            name, value, end = entry.groups()
            if value not in known:
                known[value] = _placement(json.loads(value))
            yield json.loads(name), known[value]
            position = entry.end()
        if text[position:].strip(_SPACE):
            raise ValueError(f"it goes on at character {position:,}, after its end")
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the metadata {PLACEMENT_KEY!r} cannot be read ({error}); write the file again", path=path
        ) from error


def parse_world_size(metadata: Mapping[str, str], *, path: str) -> int | None:
    """Return the number of ranks that the metadata gives, or None if it gives none.

    Raises
    ------
    FormatError
        The value of `WORLD_SIZE_KEY` is not a positive number.
    """
    text = metadata.get(WORLD_SIZE_KEY)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) > 0):
        raise FormatError(
            f"{path}: the metadata {WORLD_SIZE_KEY!r} is {text[:40]!r}, no number of ranks; write the file again",
            path=path,
        )
    return int(text)


def _entry(placement: Shard | PackedShard) -> dict[str, Any]:
    if isinstance(placement, PackedShard):
        return {"dim": placement.dim, "sizes": list(placement.sizes)}
    return {"dim": placement.dim} if placement.pieces is None else {"dim": placement.dim, "pieces": placement.pieces}


def _placement(entry: Any) -> Placement:
    if not isinstance(entry, dict) or "dim" not in entry or len(entry) > 2 or not set(entry) <= _KEYS:
        raise ValueError(f"{str(entry)[:80]} is no placement")
    if "sizes" in entry:
        if not isinstance(entry["sizes"], list):
            raise ValueError(f"{str(entry)[:80]} is no placement")
        return PackedShard(entry["dim"], tuple(entry["sizes"]))
    return Shard(entry["dim"], entry.get("pieces"))


_KEYS = {"dim", "pieces", "sizes"}
_SPACE = " \t\n\r"
# The text is parsed entry by entry, because json.loads would hold the GIL until it has read all entries.
_BEGIN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}?)")
_ENTRY = re.compile(r'[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*(\{[^{}]*\})[ \t\n\r]*([,}])', re.DOTALL)
