"""The speed of the machine itself: copies in memory, and plain reads of files."""

from __future__ import annotations

import os

import numpy as np

from bench.ways.base import Case, Run, Way

_BUFFER_BYTES = 8 << 20


def _memcpy(case: Case) -> Run:
    """Copy the rank's number of bytes in one thread, between memory whose pages have been touched."""
    case.nbytes = case.data.rank_bytes
    source, destination = (np.full(case.nbytes, number, np.uint8) for number in (1, 2))

    def run() -> None:
        np.copyto(destination, source)

    return run


def _sequential_read(case: Case) -> Run:
    """Read the files sequentially into one buffer."""
    case.nbytes = case.data.rank_bytes
    buffer = bytearray(b"\1") * _BUFFER_BYTES

    def run() -> None:
        for path in case.data.files:
            with path.open("rb", buffering=0) as file:
                offset = 0
                while count := os.preadv(file.fileno(), [buffer], offset):
                    offset += count

    return run


CEILINGS = {"memcpy": Way(_memcpy), "sequential-read": Way(_sequential_read)}
