"""Placements in the metadata of rank shards, so that the ranks can be joined again.

``asyncshard.placement``
    JSON: an object with an entry for each tensor of the file that is divided, such as ``{"dim": 0}``, with ``"pieces"``
    where there are fewer than ranks, or with ``"sizes"`` where several tensors are fused. Others are whole.
``asyncshard.world_size``
    Of how many ranks the file is one.

``"pieces"`` is the most that there may be: a world with fewer ranks has one for each, and the number stays for a larger
world that it is cut for next.
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
WORLD_SIZE_KEY = "asyncshard.world_size"


def format_placements(placed: Iterable[tuple[str, Placement]]) -> str:
    """Return the entries of one file; whole tensors have none."""
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
    """Yield the entries of one file: the tensor's name and its placement. A wrapper may let go of the GIL between them.

    `known` are placements by their text: those of other files, to which these are added.

    Raises
    ------
    FormatError
        It is something else.
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
    """Return the number of ranks that the metadata names, or None."""
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
# The text is taken apart entry by entry: json.loads holds the GIL until it has read all of it.
_BEGIN = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*(\}?)")
_ENTRY = re.compile(r'[ \t\n\r]*("[^"\\]*(?:\\.[^"\\]*)*")[ \t\n\r]*:[ \t\n\r]*(\{[^{}]*\})[ \t\n\r]*([,}])', re.DOTALL)
