"""The report of the verification of a cache. It needs no optional package."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Result of the verification of a cache."""

    entries: int
    """Objects of which the cache has some or all blocks."""
    blocks: int
    """Blocks of these objects; all match their digests."""
    nbytes: int
    """Bytes of these blocks."""
    dropped: tuple[str, ...]
    """Paths of entries that were wrong and have been removed."""
