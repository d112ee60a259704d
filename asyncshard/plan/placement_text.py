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
from collections.abc import Mapping
from typing import Any

from asyncshard.errors import FormatError
from asyncshard.plan.placements import PackedShard, Placement, Replicate, Shard

PLACEMENT_KEY = "asyncshard.placement"
WORLD_SIZE_KEY = "asyncshard.world_size"


def format_placement(placement: Placement) -> dict[str, Any] | None:
    """Return what stands for a placement in JSON; None for a whole tensor, which has no entry."""
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, PackedShard):
        return {"dim": placement.dim, "sizes": list(placement.sizes)}
    return {"dim": placement.dim} if placement.pieces is None else {"dim": placement.dim, "pieces": placement.pieces}


def parse_placements(text: str, *, path: str) -> dict[str, Placement]:
    """Read the entries of one file.

    Raises
    ------
    FormatError
        It is something else.
    """
    try:
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError("it is no object")
        return {name: _placement(entry) for name, entry in entries.items()}
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


def _placement(entry: Any) -> Placement:
    if not isinstance(entry, dict) or "dim" not in entry or len(entry) > 2 or not set(entry) <= _KEYS:
        raise ValueError(f"{str(entry)[:80]} is no placement")
    if "sizes" in entry:
        if not isinstance(entry["sizes"], list):
            raise ValueError(f"{str(entry)[:80]} is no placement")
        return PackedShard(entry["dim"], tuple(entry["sizes"]))
    return Shard(entry["dim"], entry.get("pieces"))


_KEYS = {"dim", "pieces", "sizes"}
