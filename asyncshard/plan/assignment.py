"""The assignment of parameters to ranks: the largest parameter first, each to the rank with the least load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncshard import _core
from asyncshard._typing import Int64Array
from asyncshard.plan.division.chunks import whole_number

_INT64_MAX = 2**63 - 1


def compute_shard_assignment(
    num_params: int, num_ranks: int, param_sizes: Sequence[int] | NDArray[np.integer[Any]]
) -> list[int]:
    """Distribute parameters over ranks so that all ranks have about the same load.

    Parameters are taken from the largest to the smallest, and each is given to the rank with the smallest load so far.
    Among equal sizes the lower index is taken first, and among equal loads the lower rank, so the result depends on the
    arguments alone. No rank's load exceeds the mean load by more than one parameter.

    Parameters
    ----------
    num_params : int
        The number of parameters.
    num_ranks : int
        The number of ranks, at least 1.
    param_sizes : sequence of int or integer array
        The size of each parameter, in any unit. Sizes are not negative, and their sum is below 2**63.

    Returns
    -------
    list of int
        The rank of each parameter.

    Raises
    ------
    ValueError
        A number is out of these bounds or not a whole number, or ``param_sizes`` has not ``num_params`` elements.
    """
    num_params = whole_number(num_params, "num_params", minimum=0)
    num_ranks = whole_number(num_ranks, "num_ranks", minimum=1)
    sizes = _as_int64(param_sizes)
    if len(sizes) != num_params:
        raise ValueError(f"param_sizes has {len(sizes)} entries, num_params is {num_params}")
    ranks = np.empty(num_params, dtype=np.int64)
    _core.assign_shards(sizes, min(num_ranks, _INT64_MAX), ranks)
    return ranks.tolist()


def _as_int64(sizes: Sequence[int] | NDArray[np.integer[Any]]) -> Int64Array:
    if isinstance(sizes, np.ndarray):
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
            raise ValueError(f"param_sizes must be one row of integers, got {sizes.dtype} of shape {sizes.shape}")
        if sizes.dtype.kind == "u" and len(sizes) and int(sizes.max()) > _INT64_MAX:
            raise ValueError(f"a size is above 2**63 - 1: {sizes.max()}")
        return np.ascontiguousarray(sizes, dtype=np.int64)
    values = list(sizes)
    # NumPy would convert floats, texts and bools among them silently.
    for kind in set(map(type, values)):
        if kind is bool or not issubclass(kind, (int, np.integer)):
            raise ValueError(f"param_sizes must hold whole numbers, found a {kind.__name__}")
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        raise ValueError(f"a size is beyond 63 bits: {max(values, key=abs)}") from None
