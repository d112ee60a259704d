"""The checksums that S3 keeps of objects, compared with what was read.

A value is of the whole object (``FULL_OBJECT``), or of its parts' checksums (``COMPOSITE``, ``value-N``), which says
nothing without the parts' sizes. Objects are read in ranges, so the CRCs of ranges are combined; SHA-256 cannot be, and
is compared only where one answer held the whole object. (S3 user guide, "Checking object integrity".)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from awscrt import checksums

_STEP = 1 << 20
"""awscrt holds the GIL while it works."""


class Algorithm(NamedTuple):
    """A CRC whose values of neighbouring ranges combine."""

    name: str
    nbytes: int
    update: Callable[[memoryview, int], int]
    combine: Callable[[int, int, int], int]
    """Of the first, of the second, and how long the second is."""


_CRCS = (
    Algorithm("CRC64NVME", 8, checksums.crc64nvme, checksums.combine_crc64nvme),
    Algorithm("CRC32C", 4, checksums.crc32c, checksums.combine_crc32c),
    Algorithm("CRC32", 4, checksums.crc32, checksums.combine_crc32),
)
_SHA256 = "x-amz-checksum-sha256"


class Stored(NamedTuple):
    """What the server says about a whole object."""

    crc: Algorithm | None
    value: bytes
    """Of `crc`, or of SHA-256 where that is None."""


def stored(headers: Mapping[str, str]) -> Stored | None:
    """Return the checksum of the whole object that an answer's headers hold, if any."""
    if headers.get("x-amz-checksum-type", "FULL_OBJECT").upper() != "FULL_OBJECT":
        return None
    for crc in _CRCS:
        value = _decoded(headers.get(f"x-amz-checksum-{crc.name.lower()}"), crc.nbytes)
        if value is not None:
            return Stored(crc, value)
    value = _decoded(headers.get(_SHA256), 32)
    return None if value is None else Stored(None, value)


def _decoded(text: str | None, nbytes: int) -> bytes | None:
    try:
        value = base64.b64decode(text or "", validate=True)
    except ValueError:  # of a composite one, "value-N"
        return None
    return value if len(value) == nbytes else None


def crc_of(algorithm: Algorithm, views: Sequence[memoryview]) -> int:
    """Return the CRC of some memory. Slow: not for an event loop."""
    value = 0
    for view in views:
        for at in range(0, len(view), _STEP):
            value = algorithm.update(view[at : at + _STEP], value)
    return value


def matches(stored: Stored, views: Sequence[memoryview]) -> bool:
    """Whether memory is the whole object that a checksum is of. Slow: not for an event loop."""
    if stored.crc is not None:
        return crc_of(stored.crc, views).to_bytes(stored.crc.nbytes, "big") == stored.value
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.digest() == stored.value


class Coverage:
    """What has been read of one object, as the CRCs of its ranges.

    Parameters
    ----------
    algorithm : Algorithm
    size : int
        Bytes of the object.
    first : bytes
        Its first bytes, read with the header: ranges that are read later may begin within them.
    """

    def __init__(self, algorithm: Algorithm, size: int, first: bytes) -> None:
        self.algorithm = algorithm
        self._size = size
        self._first = memoryview(first)
        self._ranges: dict[int, tuple[int, int]] = {}
        """Stop and CRC of each range, by its start."""
        self._covered = len(first)

    def add(self, start: int, stop: int, crc: int) -> None:
        """Note a range that was read."""
        known = self._ranges.get(start)
        self._covered += stop - start - (known[0] - start if known else 0)
        self._ranges[start] = (stop, crc)

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return start, stop and CRC of each."""
        return [(start, stop, crc) for start, (stop, crc) in sorted(self._ranges.items())]

    def whole(self) -> int | None:
        """Return the CRC of the whole object; None as long as it is not covered without overlaps."""
        if self._covered < self._size:
            return None
        at = min(self._ranges, default=self._size)
        if at > len(self._first):
            return None
        value = crc_of(self.algorithm, [self._first[:at]])
        while at in self._ranges:
            stop, crc = self._ranges[at]
            value = self.algorithm.combine(value, crc, stop - at)
            at = stop
        return value if at == self._size else None
