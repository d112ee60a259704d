"""Typed stub of the compiled core; ``stubtest`` holds the two together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# --- memory

class Region:
    nbytes: int
    def __init__(self, nbytes: int) -> None: ...
    def discard(self, start: int, stop: int) -> None: ...

class ReturnList:
    wake: Callable[[], object] | None
    is_awaited: bool
    discards: bool
    def collect(self) -> list[int]: ...

class Lease:
    start: int
    nbytes: int
    def __init__(self, region: Region, start: int, nbytes: int, returns: ReturnList, token: int) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class Span:
    nbytes: int
    def __init__(self, address: int, nbytes: int, owner: object) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def spread(
    buffer: Buffer, sources: NDArray[np.int64], targets: NDArray[np.int64], lengths: NDArray[np.int64]
) -> None: ...

# --- reads

class StopFlag:
    def set(self) -> None: ...
    def is_set(self) -> bool: ...

def read_vectors(fd: int, offset: int, buffers: Sequence[Buffer], stop: StopFlag) -> tuple[int, int]: ...

# --- names, json, header

# --- weight_map

# --- subtensors

def find_uncovered(
    starts: NDArray[np.uint64],
    stops: NDArray[np.uint64],
    contiguous: NDArray[np.uint8],
    groups: NDArray[np.int64],
    name_ranks: NDArray[np.int64],
    keep: NDArray[np.uint8],
) -> None: ...

# --- assignment and shapes

def assign_shards(sizes: NDArray[np.int64], num_ranks: int, out: NDArray[np.int64]) -> None: ...
def check_shard_shapes(
    dims: NDArray[np.int64],
    shape_offsets: NDArray[np.int64],
    shape_ndims: NDArray[np.int64],
    local_offsets: NDArray[np.int64],
    local_ndims: NDArray[np.int64],
    shard_dims: NDArray[np.int64],
    num_shards: NDArray[np.int64],
    rank: int,
    world_size: int,
    faults: NDArray[np.uint8],
) -> None: ...
