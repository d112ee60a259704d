"""Claims on blocks that are being fetched: by futures within a store, by file locks towards other stores and processes.

One file lock stands for a segment of 8 blocks, and is held while this store fetches or writes any of them. There are
256 files of locks, onto which the segments are spread; two segments that share a file merely wait for each other.
Nobody waits while holding a lock that another waits for, so the order in which locks are taken does not matter.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Sequence

import filelock

from asyncshard.tasks.threads import DaemonThreads

SLOTS = 256
_SEGMENT_BLOCKS = 8
_PAUSES_S = (0.002, 0.05)


class _Slot:
    """A file lock that this store holds, or is asking for."""

    def __init__(self, path: str) -> None:
        # Released in another thread than it is acquired in.
        self.lock = filelock.FileLock(path, mode=0o600, thread_local=False)
        self.blocks = 0
        """How many claimed blocks of this store the lock stands for."""

    def acquire(self) -> None:
        """Take the file lock unless another has it; `lock.is_locked` then tells which."""
        try:
            self.lock.acquire(blocking=False)
        except filelock.Timeout:
            return


class BlockLocks:
    """The blocks that one store is fetching. It belongs to one event loop; files are touched in `threads` alone.

    Parameters
    ----------
    directory : str
        The folder of the locks' files.
    """

    def __init__(self, directory: str, threads: DaemonThreads) -> None:
        self._directory = directory
        self._threads = threads
        self._slots: dict[int, _Slot] = {}
        self._claimed: dict[tuple[bytes, int], asyncio.Future[None]] = {}
        self._progress = time.monotonic()
        """Time at which blocks were last released."""

    async def claim(self, key: bytes, blocks: Iterable[int]) -> list[int]:
        """Claim the blocks that nobody else is fetching, and return them. Each must be released.

        Raises
        ------
        OSError, NotImplementedError
            The file system has no locks, or no room for their files. Nothing is claimed then.
        """
        loop = asyncio.get_running_loop()
        claimed = [block for block in blocks if (key, block) not in self._claimed]
        new: dict[int, _Slot] = {}
        for block in claimed:
            number = _slot_of(key, block)
            slot = self._slots.get(number) or new.setdefault(number, _Slot(self._path(number)))
            slot.blocks += 1
        # Blocks of a slot that is only asked for are another read's to wait for, as are those of a held one.
        self._slots.update(new)
        for block in claimed:
            self._claimed[key, block] = loop.create_future()
        try:
            if new:
                await self._threads.run(_acquire_all, list(new.values()))
        except BaseException:
            self._give_up(key, claimed)
            raise
        refused = [block for block in claimed if not self._slots[_slot_of(key, block)].lock.is_locked]
        self._give_up(key, refused)
        return sorted(set(claimed) - set(refused))

    def release(self, key: bytes, blocks: Iterable[int]) -> None:
        """End the claims on blocks, written or not. With the last block of a segment, its file lock is released."""
        self._give_up(key, blocks)
        self._progress = time.monotonic()

    def _give_up(self, key: bytes, blocks: Iterable[int]) -> None:
        done = []
        for block in blocks:
            self._claimed.pop((key, block)).set_result(None)
            number = _slot_of(key, block)
            slot = self._slots[number]
            slot.blocks -= 1
            if not slot.blocks:
                done.append(self._slots.pop(number))
        if done:
            self._threads.submit(_release_all, done)

    async def wait(self, key: bytes, blocks: Sequence[int], turn: int) -> None:
        """Wait until one of the blocks may have been released, longer with each `turn` of a read, counted from 0."""
        pause_s = min(_PAUSES_S[0] * 2 ** min(turn, 16), _PAUSES_S[1])
        # Not those that another read of this store merely asks for: two that ask in turn would wake each other.
        releases = [self._claimed[key, block] for block in blocks if self._holds(key, block)]
        if releases:
            await asyncio.wait(releases, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(pause_s)

    def _holds(self, key: bytes, block: int) -> bool:
        return (key, block) in self._claimed and self._slots[_slot_of(key, block)].lock.is_locked

    def stalled_s(self, since: float) -> float:
        """Return the seconds since `since`, or since this store last released a block, if that was later."""
        return time.monotonic() - max(since, self._progress)

    def _path(self, number: int) -> str:
        return os.path.join(self._directory, f"{number:02x}")


def _slot_of(key: bytes, block: int) -> int:
    # In turn from the object's first one on: reads that follow one another share none by chance.
    return (key[0] + block // _SEGMENT_BLOCKS) % SLOTS


def _acquire_all(slots: list[_Slot]) -> None:
    for slot in slots:
        slot.acquire()


def _release_all(slots: list[_Slot]) -> None:
    for slot in slots:
        slot.lock.release()
