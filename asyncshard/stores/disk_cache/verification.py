"""Verification of a cache: every block is compared with its digest."""

from __future__ import annotations

import os

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache.directory import DiskCache
from asyncshard.stores.disk_cache.entry import ABSENT, BLOCK_BYTES, TEMPORARY, CorruptEntryError, Entry, digest_of
from asyncshard.stores.disk_cache.report import CacheReport


def verify(cache: DiskCache, stop: StopFlag) -> CacheReport:
    """Read all entries, and remove wrong ones, each with a warning. It blocks, and ends early when told to stop.

    Raises
    ------
    OSError
        The directory or a file in it cannot be read.
    """
    entries = blocks = nbytes = 0
    dropped = []
    memory = memoryview(bytearray(BLOCK_BYTES))
    os.stat(cache.directory)
    names = sorted(os.listdir(cache.entries)) if os.path.isdir(cache.entries) else []
    for name in names:
        path = os.path.join(cache.entries, name)
        if name.startswith(TEMPORARY):
            continue
        try:
            with Entry.open_any(path) as entry:
                sizes = [_compare(entry, block, digest, memory, stop) for block, digest in _present(entry)]
        except FileNotFoundError:  # evicted meanwhile
            continue
        except CorruptEntryError as error:
            if cache.discard(path, name, error):
                dropped.append(path)
        else:
            entries, blocks, nbytes = entries + 1, blocks + len(sizes), nbytes + sum(sizes)
        if stop.is_set():
            break
    return CacheReport(entries, blocks, nbytes, tuple(dropped))


def _present(entry: Entry) -> list[tuple[int, bytes]]:
    digests = entry.digests(range(entry.layout.block_count))
    return [(block, digest) for block, digest in enumerate(digests) if digest != ABSENT]


def _compare(entry: Entry, block: int, digest: bytes, memory: memoryview, stop: StopFlag) -> int:
    """Compare a block with its digest, and return how many bytes it has."""
    start, end = entry.layout.span(block)
    view = memory[: end - start]
    entry.read(start, [view], stop)
    if not stop.is_set() and digest_of(block, [view]) != digest:
        raise entry.corrupt(f"block {block:,} does not match its digest")
    return end - start
