"""Typed stub of the compiled core; ``stubtest`` holds the two together."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

# --- memory

# --- reads

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
