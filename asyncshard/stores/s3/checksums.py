"""Checksums that S3 keeps of objects, to be compared with the bytes that were read.

A checksum is that of the whole object (``FULL_OBJECT``), or that of its parts' checksums (``COMPOSITE``, ``value-N``),
which says nothing without the parts' sizes. Objects are read in ranges, so the CRCs of ranges are combined. SHA-256
cannot be combined: it is compared only where one response held the whole object. (S3 user guide, "Checking object
integrity".)
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from awscrt import checksums

_STEP = 1 << 20
"""1 MiB is given to awscrt at a time, since it holds the GIL while it works."""


class Algorithm(NamedTuple):
    """A CRC. The values of two neighbouring ranges give that of both together."""

    name: str
    """The checksum in the text form that S3 uses."""
    nbytes: int
    """Bytes of a value."""
    update: Callable[[memoryview, int], int]
    """Returns the value of bytes that follow others, from the bytes and the value of the others."""
    combine: Callable[[int, int, int], int]
    """Returns the value of two ranges from that of the first, that of the second, and the second's length."""


_CRCS = (
    Algorithm("CRC64NVME", 8, checksums.crc64nvme, checksums.combine_crc64nvme),
    Algorithm("CRC32C", 4, checksums.crc32c, checksums.combine_crc32c),
    Algorithm("CRC32", 4, checksums.crc32, checksums.combine_crc32),
)
_SHA256 = "x-amz-checksum-sha256"


class StoredChecksum(NamedTuple):
    """The checksum that the server has of a whole object."""

    crc: Algorithm | None
    """How the value was computed; None for SHA-256."""
    value: bytes


def stored_checksum(headers: Mapping[str, str]) -> StoredChecksum | None:
    """Return the checksum of the whole object from the headers of a response; None where they have none."""
    if headers.get("x-amz-checksum-type", "FULL_OBJECT").upper() != "FULL_OBJECT":
        return None
    for crc in _CRCS:
        value = _decoded(headers.get(f"x-amz-checksum-{crc.name.lower()}"), crc.nbytes)
        if value is not None:
            return StoredChecksum(crc, value)
    value = _decoded(headers.get(_SHA256), 32)
    return None if value is None else StoredChecksum(None, value)


def _decoded(text: str | None, nbytes: int) -> bytes | None:
    try:
        value = base64.b64decode(text or "", validate=True)
    except ValueError:  # a composite checksum, "value-N"
        return None
    return value if len(value) == nbytes else None


def crc_of(algorithm: Algorithm, views: Sequence[memoryview]) -> int:
    """Return the CRC of some memory. Slow: not for an event loop."""
    value = 0
    for view in views:
        for at in range(0, len(view), _STEP):
            value = algorithm.update(view[at : at + _STEP], value)
    return value


def matches(checksum: StoredChecksum, views: Sequence[memoryview]) -> bool:
    """Return whether memory that holds a whole object has its checksum. Slow: not for an event loop."""
    if checksum.crc is not None:
        return crc_of(checksum.crc, views).to_bytes(checksum.crc.nbytes, "big") == checksum.value
    digest = hashlib.sha256()
    for view in views:
        digest.update(view)
    return digest.digest() == checksum.value


class Coverage:
    """The ranges of one object that have been read, with the CRC of each.

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
        """End and CRC of each range, by its start."""
        self._covered = len(first)

    def add(self, start: int, stop: int, crc: int) -> None:
        """Add a range that was read."""
        known = self._ranges.get(start)
        self._covered += stop - start - (known[0] - start if known else 0)
        self._ranges[start] = (stop, crc)

    def ranges(self) -> list[tuple[int, int, int]]:
        """Return start, stop and CRC of each range, in ascending order."""
        return [(start, stop, crc) for start, (stop, crc) in sorted(self._ranges.items())]

    def whole(self) -> int | None:
        """Return the CRC of the whole object; None unless the ranges cover it without overlaps."""
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
