"""The bytes that were read of each object, compared with the checksum that the server has of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncshard.events import Listener, Unverified, Verified
from asyncshard.stores.http.response import Pin
from asyncshard.stores.s3.checksums import Coverage, StoredChecksum, crc_of, matches, stored_checksum
from asyncshard.stores.scatter import Scatter
from asyncshard.tasks.threads import DaemonThreads


@dataclass(slots=True, eq=False)
class _Object:
    """An object whose reads are followed."""

    pin: Pin
    checksum: StoredChecksum | None
    """None where the server has no checksum that can be compared."""
    coverage: Coverage | None
    """The ranges read so far; None where their checksums cannot be combined."""


class Integrity:
    """Follows the reads of a store's objects, and reports which match their checksums. Computes in a thread of its own.

    Parameters
    ----------
    report : Listener
        Called in the event loop that this is used in.
    """

    def __init__(self, report: Listener) -> None:
        self._report = report
        self._objects: dict[str, _Object] = {}
        self._threads = DaemonThreads(1, "asyncshard-checksum")

    async def aclose(self) -> None:
        await self._threads.aclose()

    def begin(self, path: str, pin: Pin, headers: Mapping[str, str], first: bytes) -> None:
        """Begin to follow an object that was opened, from the headers of a HEAD request and its first bytes."""
        checksum = stored_checksum(headers) if headers.get("etag") == pin.etag else None
        crc = None if checksum is None else checksum.crc
        coverage = None if crc is None else Coverage(crc, pin.size, first)
        self._objects[path] = _Object(pin, checksum, coverage)
        self._report(Unverified(path))

    async def is_right(self, path: str, pin: Pin, start: int, scatter: Scatter) -> bool:
        """Add a range that was read. Return False if the object is now read whole and does not match its checksum."""
        record = self._objects.get(path)
        if record is None or record.checksum is None or record.pin != pin:
            return True
        views = scatter.views(0, scatter.nbytes)
        if scatter.nbytes == pin.size:
            return self._tell(path, await self._threads.run(matches, record.checksum, views))
        if record.coverage is None:
            return True
        crc = await self._threads.run(crc_of, record.coverage.algorithm, views)
        record.coverage.add(start, start + scatter.nbytes, crc)
        whole = record.coverage.whole()
        if whole is None:
            return True
        return self._tell(path, whole.to_bytes(record.coverage.algorithm.nbytes, "big") == record.checksum.value)

    def _tell(self, path: str, is_right: bool) -> bool:
        self._report(Verified(path) if is_right else Unverified(path))
        return is_right

    async def crc_of(self, path: str, scatter: Scatter) -> int:
        """Return the CRC of bytes that were read, by the algorithm of the object's checksum."""
        coverage = self._objects[path].coverage
        assert coverage is not None
        return await self._threads.run(crc_of, coverage.algorithm, scatter.views(0, scatter.nbytes))

    def ranges(self, path: str) -> list[tuple[int, int, int]]:
        """Return start, stop and CRC of each range of an object that was read."""
        coverage = self._objects[path].coverage
        return [] if coverage is None else coverage.ranges()
