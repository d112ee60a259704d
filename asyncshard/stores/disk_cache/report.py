"""The report of a check of the whole cache; it needs no optional package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What a cache holds, and what it held that was wrong."""

    entries: int
    """Objects of which the cache has a part or all."""
    blocks: int
    """Their blocks, all of which match their digests."""
    nbytes: int
    """Bytes of these blocks."""
    dropped: tuple[str, ...]
    """Paths of the entries that were wrong, and have been removed."""
