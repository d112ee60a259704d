"""What was read of each object, against the checksum that the server has of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from asyncshard.events import Listener, Unverified, Verified
from asyncshard.stores.http.response import Pin
from asyncshard.stores.s3.checksums import Coverage, Stored, crc_of, matches, stored
from asyncshard.stores.scatter import Scatter
from asyncshard.tasks.threads import DaemonThreads


@dataclass(slots=True, eq=False)
class _Object:
    pin: Pin
    stored: Stored | None
    coverage: Coverage | None


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
        """Note an object that was opened, the headers of a HEAD of it, and its first bytes."""
        known = stored(headers) if headers.get("etag") == pin.etag else None
        coverage = None if known is None or known.crc is None else Coverage(known.crc, pin.size, first)
        self._objects[path] = _Object(pin, known, coverage)
        self._report(Unverified(path))

    async def is_right(self, path: str, pin: Pin, start: int, scatter: Scatter) -> bool:
        """Take a range that was read; False if it, or with it the whole object, does not match."""
        known = self._objects.get(path)
        if known is None or known.stored is None or known.pin != pin:
            return True
        views = scatter.views(0, scatter.nbytes)
        if scatter.nbytes == pin.size:
            return self._tell(path, await self._threads.run(matches, known.stored, views))
        if known.coverage is None:
            return True
        crc = await self._threads.run(crc_of, known.coverage.algorithm, views)
        known.coverage.add(start, start + scatter.nbytes, crc)
        whole = known.coverage.whole()
        if whole is None:
            return True
        return self._tell(path, whole.to_bytes(known.coverage.algorithm.nbytes, "big") == known.stored.value)

    def _tell(self, path: str, is_right: bool) -> bool:
        self._report(Verified(path) if is_right else Unverified(path))
        return is_right

    async def crc_of(self, path: str, scatter: Scatter) -> int:
        """Return the CRC of what was read, by the object's algorithm."""
        coverage = self._objects[path].coverage
        assert coverage is not None
        return await self._threads.run(crc_of, coverage.algorithm, scatter.views(0, scatter.nbytes))

    def ranges(self, path: str) -> list[tuple[int, int, int]]:
        """Return start, stop and CRC of what was read of an object in ranges."""
        coverage = self._objects[path].coverage
        return [] if coverage is None else coverage.ranges()
