"""Chunks of a dimension: which rows belong to a rank, by the rule of ``torch.chunk``.

If a dimension is cut into ``n`` chunks, each has ``ceil(size / n)`` rows until no rows are left, so the last chunks may
be smaller or empty. 10 rows in 4 chunks give 3, 3, 3, 1; in 8 chunks they give 2, 2, 2, 2, 2, 0, 0, 0.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import numpy as np

from asyncshard import _core

_INT64_MAX = 2**63 - 1


def whole_number(value: object, what: str, *, minimum: int | None = None) -> int:
    """Return ``value`` as an int.

    Raises
    ------
    ValueError
        ``value`` is a bool, not a whole number, or below ``minimum``; the message calls it ``what``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what} must be a whole number, got {short_repr(value)}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{what} must be at least {minimum}, got {number}")
    return number


def chunk_bounds(size: int, num_chunks: int, index: int) -> tuple[int, int]:
    """Return the rows ``[start, stop)`` of chunk ``index`` when ``size`` rows are cut into ``num_chunks`` chunks.

    Raises
    ------
    ValueError
        ``size`` is negative, ``num_chunks`` is below 1, or ``index`` is not one of the chunks.
    """
    if size < 0:
        raise ValueError(f"size must be at least 0, got {size}")
    if num_chunks < 1:
        raise ValueError(f"num_chunks must be at least 1, got {num_chunks}")
    if not 0 <= index < num_chunks:
        raise ValueError(f"chunk {index} is not one of {num_chunks}, which count from 0")
    chunk = -(-size // num_chunks)
    start = min(index * chunk, size)
    return start, min(start + chunk, size)


@dataclass(frozen=True, slots=True)
class ShardedTensor:
    """One shard of a tensor that is cut along one dimension.

    Raises
    ------
    ValueError
        A size is negative, the dimension is out of range, the index is not below the number of shards, or a scalar is
        cut into several shards.
    """

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: Any
    """Dtype of the tensor, in any form."""
    shard_dim: int = 0
    """The dimension that is cut. A negative one counts from the last dimension, and is stored as a non-negative one."""
    num_shards: int = 1
    """The number of shards of the tensor."""
    local_shard_index: int = 0
    """Index of this shard, from 0."""

    def __post_init__(self) -> None:
        label = f"tensor {short_repr(self.name)}"
        shape = _whole_shape(self.shape, f"{label}: shape")
        num_shards = whole_number(self.num_shards, f"{label}: num_shards", minimum=1)
        index = whole_number(self.local_shard_index, f"{label}: local_shard_index", minimum=0)
        shard_dim = whole_number(self.shard_dim, f"{label}: shard_dim")
        if index >= num_shards:
            raise ValueError(f"{label}: local_shard_index {index} is not one of {num_shards} shards, counted from 0")
        if not shape and num_shards > 1:
            raise ValueError(f"{label}: a scalar has no dimension to cut into {num_shards} shards")
        ndim = max(len(shape), 1)  # as in torch, a scalar takes 0 and -1
        if not -ndim <= shard_dim < ndim:
            raise ValueError(f"{label}: shard_dim {shard_dim} is out of range for shape {shape}")
        for field, value in (
            ("shape", shape),
            ("shard_dim", shard_dim % ndim),
            ("num_shards", num_shards),
            ("local_shard_index", index),
        ):
            object.__setattr__(self, field, value)

    @property
    def local_start(self) -> int:
        """The first row of this shard along ``shard_dim``."""
        return self._bounds()[0]

    @property
    def local_stop(self) -> int:
        """The row after the last one of this shard; a scalar counts as one row."""
        return self._bounds()[1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this shard, as ``torch.chunk`` makes it; a chunk that ``torch.chunk`` leaves out has no rows."""
        if not self.shape:
            return ()
        start, stop = self._bounds()
        return (*self.shape[: self.shard_dim], stop - start, *self.shape[self.shard_dim + 1 :])

    def _bounds(self) -> tuple[int, int]:
        size = self.shape[self.shard_dim] if self.shape else 1
        return chunk_bounds(size, self.num_shards, self.local_shard_index)


def validate_shard_shapes(shard_specs: Iterable[Mapping[str, Any]], rank: int, world_size: int) -> list[str]:
    """Check the shards that one rank is to hold, and return a sentence for each problem.

    Parameters
    ----------
    shard_specs : iterable of mappings
        Each mapping has ``name``, ``shape`` (of the whole tensor), ``shard_dim`` (a negative one counts from the last
        dimension) and ``num_shards`` (``world_size``, or 1 for a tensor that every rank holds whole). It may have
        ``local_shape`` (by the rule of ``torch.chunk``) and ``dtype`` (any name that is not empty).
    rank, world_size : int
        The rank that is to hold the shards, and the number of ranks.

    Returns
    -------
    list of str
        The problems of the world first, then those of each mapping in order; empty if there are none. A bad mapping
        never raises. A rule that needs a number with a problem is not checked.
    """
    world_problems: list[str] = []
    known_rank, known_world = _check_world(rank, world_size, world_problems)
    seen: dict[str, int] = {}
    specs: list[_Spec | None] = []
    spec_problems: list[list[str]] = []
    for position, raw in enumerate(shard_specs):
        problems: list[str] = []
        specs.append(_read_spec(raw, position, seen, problems))
        spec_problems.append(problems)
    readable = [(spec, problems) for spec, problems in zip(specs, spec_problems, strict=True) if spec is not None]
    codes = _check([spec for spec, _ in readable], known_rank, known_world)
    for (spec, problems), code in zip(readable, codes, strict=True):
        problems += _sentences(spec, code, known_rank, known_world)
    return [*world_problems, *chain.from_iterable(spec_problems)]


class _Spec(NamedTuple):
    """The fields of one mapping that the kernel checks, and the words that messages call it by."""

    label: str
    shape: tuple[int, ...]
    shard_dim: int
    num_shards: int
    local_shape: tuple[int, ...] | None


def _check_world(rank: object, world_size: object, problems: list[str]) -> tuple[int, int]:
    """Return the rank and the world size, each -1 if it has a problem."""
    checked_world = _int64_or_problem(world_size, "world_size", problems, minimum=1)
    checked_rank = _int64_or_problem(rank, "rank", problems, minimum=0)
    if checked_rank is not None and checked_world is not None and checked_rank >= checked_world:
        problems.append(f"rank {checked_rank} is outside the world of {checked_world} ranks, which count from 0.")
        checked_rank = None
    return (-1 if checked_rank is None else checked_rank), (-1 if checked_world is None else checked_world)


def _read_spec(raw: object, position: int, seen: dict[str, int], problems: list[str]) -> _Spec | None:
    """Return one mapping as a `_Spec`, or None and a problem for each field that is missing or of the wrong type."""
    if not isinstance(raw, Mapping):
        problems.append(f"Spec {position} is a {type(raw).__name__}, not a mapping.")
        return None
    name = raw.get("name")
    label = f"Spec {position}"
    if isinstance(name, str) and name:
        label += f" ({short_repr(name)})"
        if name in seen:
            problems.append(f"{label}: the name is taken by spec {seen[name]}.")
        seen.setdefault(name, position)
    elif "name" in raw:
        problems.append(f"{label}: name must be a text that is not empty, got {short_repr(name)}.")
    missing = [key for key in ("name", "shape", "shard_dim", "num_shards") if key not in raw]
    if missing:
        problems.append(f"{label}: {', '.join(missing)} missing.")
    dtype = raw.get("dtype", "-")
    if not isinstance(dtype, str) or not dtype:
        problems.append(f"{label}: dtype must be a name that is not empty, got {short_repr(dtype)}.")
    shape = _shape_or_problem(raw["shape"], f"{label}: shape", problems) if "shape" in raw else None
    local = raw.get("local_shape")
    local_shape = None if local is None else _shape_or_problem(local, f"{label}: local_shape", problems)
    shard_dim = num_shards = None
    if "shard_dim" in raw:
        shard_dim = _int64_or_problem(raw["shard_dim"], f"{label}: shard_dim", problems)
    if "num_shards" in raw:
        num_shards = _int64_or_problem(raw["num_shards"], f"{label}: num_shards", problems, minimum=1)
    if shape is None or shard_dim is None or num_shards is None:
        return None
    return _Spec(label, shape, shard_dim, num_shards, local_shape)


def _check(specs: list[_Spec], rank: int, world_size: int) -> list[int]:
    """Return the kernel's code for each spec: the rules that it breaks, as bits."""
    dims: list[int] = []
    rows: list[tuple[int, ...]] = []
    for spec in specs:
        local = spec.local_shape
        shape_offset, local_offset = len(dims), len(dims) + len(spec.shape)
        dims += (*spec.shape, *(local or ()))
        local_ndim = -1 if local is None else len(local)
        rows.append((shape_offset, len(spec.shape), local_offset, local_ndim, spec.shard_dim, spec.num_shards))
    shape_offsets, shape_ndims, local_offsets, local_ndims, shard_dims, num_shards = np.ascontiguousarray(
        np.array(rows, dtype=np.int64).reshape(-1, 6).T
    )
    codes = np.zeros(len(specs), dtype=np.uint8)
    _core.check_shard_shapes(
        np.array(dims, dtype=np.int64),
        shape_offsets,
        shape_ndims,
        local_offsets,
        local_ndims,
        shard_dims,
        num_shards,
        rank,
        world_size,
        codes,
    )
    return codes.tolist()


def _sentences(spec: _Spec, code: int, rank: int, world_size: int) -> list[str]:
    """Return a sentence for each bit of the kernel's code."""
    sentences = []
    if code & 1:
        sentences.append(
            f"{spec.label}: num_shards is {spec.num_shards}, must be {world_size} (world_size) or 1 (replicated)."
        )
    if code & 2:
        sentences.append(f"{spec.label}: shard_dim {spec.shard_dim} is out of range for shape {_show(spec.shape)}.")
    if code & 4 and spec.local_shape is not None:
        index = rank if spec.num_shards > 1 else 0
        whole = ShardedTensor("", spec.shape, "", spec.shard_dim, spec.num_shards, index)
        sentences.append(
            f"{spec.label}: local_shape is {_show(spec.local_shape)}, must be {_show(whole.local_shape)}: "
            f"shard {index} of {spec.num_shards} of shape {_show(spec.shape)} along dimension {whole.shard_dim}."
        )
    return sentences


def _whole_shape(shape: object, what: str) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes, Mapping)):
        raise ValueError(f"{what} must be a sequence of whole numbers, got {short_repr(shape)}")
    try:
        sizes: tuple[object, ...] = tuple(shape)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{what} must be a sequence of whole numbers, got {short_repr(shape)}") from None
    return tuple(whole_number(size, f"{what}[{dim}]", minimum=0) for dim, size in enumerate(sizes))


def _shape_or_problem(shape: object, what: str, problems: list[str]) -> tuple[int, ...] | None:
    try:
        sizes = _whole_shape(shape, what)
    except ValueError as error:
        problems.append(f"{error}.")
        return None
    if any(size > _INT64_MAX for size in sizes):
        problems.append(f"{what} holds a size above 2**63 - 1.")
        return None
    return sizes


def _int64_or_problem(value: object, what: str, problems: list[str], *, minimum: int | None = None) -> int | None:
    try:
        number = whole_number(value, what, minimum=minimum)
    except ValueError as error:
        problems.append(f"{error}.")
        return None
    if abs(number) > _INT64_MAX:
        problems.append(f"{what} is beyond 63 bits.")
        return None
    return number


def _show(shape: tuple[int, ...]) -> str:
    return short_repr(shape)
