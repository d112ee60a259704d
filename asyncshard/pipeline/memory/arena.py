"""The memory of the pipeline's buffers: extents carved from reserved address space, lowest address first.

Fresh memory is slow (a page fault for every page), so an extent that was freed is used again while its pages are warm.
A region has twice as much address space as the budget has bytes. A region of exactly the budget would fragment: its
gaps could be large enough in sum, and each gap too small for the next extent. Address space costs nothing, and the
budget discards pages (`Arena.take_idle`) so that resident memory stays within its bytes.

An arena is not thread-safe: the budget's lock guards it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from asyncshard._core import Region

PAGE = 4096
"""Extents are whole pages of 4,096 bytes."""
_GRAIN = 2 << 20
"""The size of a region is a multiple of 2 MiB, the size of a huge page."""


def round_up(nbytes: int, grain: int = PAGE) -> int:
    """Round `nbytes` up to a multiple of `grain`."""
    return -(-nbytes // grain) * grain


class Extent(NamedTuple):
    """A part of a region, in whole pages."""

    region: Region
    start: int
    """Offset in the region of the extent's first byte."""
    stop: int
    """Offset in the region after the extent's last byte."""


@dataclass(slots=True)
class _Gap:
    """A free part of a region."""

    start: int
    """Offset in the region of the gap's first byte."""
    stop: int
    """Offset in the region after the gap's last byte."""
    is_touched: bool
    """Whether the gap's pages may be resident."""


class Arena:
    """Hands out extents, whose sizes are rounded up to pages, and takes them back.

    Parameters
    ----------
    nbytes : int
        The size of the budget in bytes. A region is twice as large.
    """

    def __init__(self, nbytes: int) -> None:
        self._region_size = round_up(2 * max(nbytes, 1), _GRAIN)
        self._gaps: dict[Region, list[_Gap]] = {}
        self.resident = 0
        """Bytes that may be resident: all extents that are handed out, and free extents that were not discarded."""

    def allocate(self, nbytes: int) -> Extent:
        """Return an extent of `nbytes`, rounded up to pages.

        Raises
        ------
        OSError
            The system refuses to reserve the address space.
        """
        size = max(round_up(nbytes), PAGE)
        for region, gaps in self._gaps.items():
            extent = self._carve(region, gaps, size)
            if extent is not None:
                return extent
        region_size = max(self._region_size, round_up(size, _GRAIN))
        region = Region(region_size)
        self._gaps[region] = [_Gap(0, region_size, is_touched=False)]
        extent = self._carve(region, self._gaps[region], size)
        assert extent is not None
        return extent

    def _carve(self, region: Region, gaps: list[_Gap], size: int) -> Extent | None:
        """Return an extent of `size` bytes from the first adjacent gaps that are large enough; None if none are."""
        first = 0
        for last, gap in enumerate(gaps):
            if last and gaps[last - 1].stop != gap.start:
                first = last
            start = gaps[first].start
            if gap.stop - start < size:
                continue
            stop = start + size
            self.resident += sum(
                min(taken.stop, stop) - taken.start for taken in gaps[first : last + 1] if not taken.is_touched
            )
            rest = [_Gap(stop, gap.stop, gap.is_touched)] if gap.stop > stop else []
            gaps[first : last + 1] = rest
            return Extent(region, start, stop)
        return None

    def free(self, extent: Extent, *, is_touched: bool = True) -> None:
        """Take an extent back. `is_touched=False` says that the caller has discarded its pages."""
        if not is_touched:
            self.resident -= extent.stop - extent.start
        gaps = self._gaps[extent.region]
        index = next((i for i, gap in enumerate(gaps) if gap.start > extent.start), len(gaps))
        gaps.insert(index, _Gap(extent.start, extent.stop, is_touched))
        for left in (index, index - 1):
            if 0 <= left < len(gaps) - 1:
                here, there = gaps[left], gaps[left + 1]
                if here.stop == there.start and here.is_touched == there.is_touched:
                    here.stop = there.stop
                    del gaps[left + 1]
        self._drop_spare_regions()

    def _drop_spare_regions(self) -> None:
        # A consumer that held many tensors made us reserve more than one region: drop those that are all free again.
        if len(self._gaps) > 1:
            for region, gaps in list(self._gaps.items())[1:]:
                if gaps and gaps[0].start == 0 and gaps[-1].stop == region.nbytes and _is_seamless(gaps):
                    self.resident -= sum(gap.stop - gap.start for gap in gaps if gap.is_touched)
                    del self._gaps[region]

    def take_idle(self, limit: int) -> list[Extent]:
        """Return free extents that may be resident, highest address first, so that at most `limit` bytes stay resident.

        These extents are taken out of the arena. The caller discards their pages, which needs no lock, and gives the
        extents back with ``free(is_touched=False)``.
        """
        taken: list[Extent] = []
        excess = self.resident - limit
        for region, gaps in reversed(self._gaps.items()):
            for gap in reversed(gaps.copy()):
                if excess <= 0:
                    return taken
                if gap.is_touched:
                    excess -= gap.stop - gap.start
                    gaps.remove(gap)
                    taken.append(Extent(region, gap.start, gap.stop))
        return taken


def _is_seamless(gaps: list[_Gap]) -> bool:
    return all(left.stop == right.start for left, right in itertools.pairwise(gaps))
