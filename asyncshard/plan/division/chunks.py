"""Shards of tensors: which slice of a dimension is a rank's, by ``torch.chunk``'s rule.

``n`` chunks of a dimension have ``ceil(size / n)`` rows each, as long as there are rows: the last ones are smaller, or
empty. So 10 rows in 4 chunks are 3, 3, 3, 1, and in 8 chunks 2, 2, 2, 2, 2, 0, 0, 0.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any, NamedTuple

import numpy as np

from asyncshard import _core

_INT64_MAX = 2**63 - 1


def whole_number(value: object, what: str, *, minimum: int | None = None) -> int:
    """Return ``value`` as an int; ValueError says that ``what`` is not a whole number, a bool, or below ``minimum``."""
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
    """Return the rows ``[start, stop)`` of chunk ``index`` of ``num_chunks``, by ``torch.chunk``'s rule.

    Raises
    ------
    ValueError
        ``size`` is negative, ``num_chunks`` below 1, or not ``0 <= index < num_chunks``.
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
    """One rank's share of a tensor that is cut along one dimension.

    Raises
    ------
    ValueError
        A size is negative, the dimension is out of range, the index is not one of the shards, or a scalar is cut.
    """

    name: str
    """Name of the tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: Any
    """Its dtype, as the caller writes it."""
    shard_dim: int = 0
    """The dimension that is cut; negative ones count from the last, and are stored counted from the first."""
    num_shards: int = 1
    """Into how many shards."""
    local_shard_index: int = 0
    """Which of them this is."""

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
        """First row of this shard along ``shard_dim``."""
        return self._bounds()[0]

    @property
    def local_stop(self) -> int:
        """The row after its last one; a scalar counts as one row."""
        return self._bounds()[1]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this shard: that of ``torch.chunk``, or with no rows where ``torch.chunk`` gives fewer chunks."""
        if not self.shape:
            return ()
        start, stop = self._bounds()
        return (*self.shape[: self.shard_dim], stop - start, *self.shape[self.shard_dim + 1 :])

    def _bounds(self) -> tuple[int, int]:
        size = self.shape[self.shard_dim] if self.shape else 1
        return chunk_bounds(size, self.num_shards, self.local_shard_index)


def validate_shard_shapes(shard_specs: Iterable[Mapping[str, Any]], rank: int, world_size: int) -> list[str]:
    """Check the shards that one rank is to hold, and say in a sentence each what is wrong with them.

    Parameters
    ----------
    shard_specs : iterable of mappings
        Each with ``name``, ``shape`` (of the whole tensor), ``shard_dim`` (negative ones count from the last) and
        ``num_shards`` (``world_size``, or 1 for a tensor that every rank holds whole), and optionally ``local_shape``
        (by ``torch.chunk``'s rule) and ``dtype`` (any name; only an empty one is a fault).
    rank, world_size : int
        Who asks, of how many.

    Returns
    -------
    list of str
        Problems of the world first, then in the order of the specs; empty when all is well. A bad spec never raises,
        and what depends on a faulty number is not checked.
    """
    faults: list[str] = []
    known_rank, known_world = _check_world(rank, world_size, faults)
    seen: dict[str, int] = {}
    specs: list[_Spec | None] = []
    found: list[list[str]] = []
    for position, raw in enumerate(shard_specs):
        complaints: list[str] = []
        specs.append(_read_spec(raw, position, seen, complaints))
        found.append(complaints)
    whole = [(spec, complaints) for spec, complaints in zip(specs, found, strict=True) if spec is not None]
    codes = _check([spec for spec, _ in whole], known_rank, known_world)
    for (spec, complaints), code in zip(whole, codes, strict=True):
        complaints += _sentences(spec, code, known_rank, known_world)
    return [*faults, *(sentence for complaints in found for sentence in complaints)]


class _Spec(NamedTuple):
    label: str
    shape: tuple[int, ...]
    shard_dim: int
    num_shards: int
    local_shape: tuple[int, ...] | None


def _check_world(rank: object, world_size: object, faults: list[str]) -> tuple[int, int]:
    """Return rank and world size, -1 for one that is no use."""
    world = _int64_or_fault(world_size, "world_size", faults, minimum=1)
    own = _int64_or_fault(rank, "rank", faults, minimum=0)
    if own is not None and world is not None and own >= world:
        faults.append(f"rank {own} is outside the world of {world} ranks, which count from 0.")
        own = None
    return (-1 if own is None else own), (-1 if world is None else world)


def _read_spec(raw: object, position: int, seen: dict[str, int], faults: list[str]) -> _Spec | None:
    """Read one spec; append a sentence for each field that is missing or of the wrong kind, and then return None."""
    if not isinstance(raw, Mapping):
        faults.append(f"Spec {position} is a {type(raw).__name__}, not a mapping.")
        return None
    name = raw.get("name")
    label = f"Spec {position}"
    if isinstance(name, str) and name:
        label += f" ({short_repr(name)})"
        if name in seen:
            faults.append(f"{label}: the name is taken by spec {seen[name]}.")
        seen.setdefault(name, position)
    elif "name" in raw:
        faults.append(f"{label}: name must be a text that is not empty, got {short_repr(name)}.")
    missing = [key for key in ("name", "shape", "shard_dim", "num_shards") if key not in raw]
    if missing:
        faults.append(f"{label}: {', '.join(missing)} missing.")
    dtype = raw.get("dtype", "-")
    if not isinstance(dtype, str) or not dtype:
        faults.append(f"{label}: dtype must be a name that is not empty, got {short_repr(dtype)}.")
    shape = _shape_or_fault(raw["shape"], f"{label}: shape", faults) if "shape" in raw else None
    local = raw.get("local_shape")
    local_shape = None if local is None else _shape_or_fault(local, f"{label}: local_shape", faults)
    shard_dim = num_shards = None
    if "shard_dim" in raw:
        shard_dim = _int64_or_fault(raw["shard_dim"], f"{label}: shard_dim", faults)
    if "num_shards" in raw:
        num_shards = _int64_or_fault(raw["num_shards"], f"{label}: num_shards", faults, minimum=1)
    if shape is None or shard_dim is None or num_shards is None:
        return None
    return _Spec(label, shape, shard_dim, num_shards, local_shape)


def _check(specs: list[_Spec], rank: int, world_size: int) -> list[int]:
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
    """Put the kernel's code into words."""
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


def _shape_or_fault(shape: object, what: str, faults: list[str]) -> tuple[int, ...] | None:
    try:
        sizes = _whole_shape(shape, what)
    except ValueError as error:
        faults.append(f"{error}.")
        return None
    if any(size > _INT64_MAX for size in sizes):
        faults.append(f"{what} holds a size above 2**63 - 1.")
        return None
    return sizes


def _int64_or_fault(value: object, what: str, faults: list[str], *, minimum: int | None = None) -> int | None:
    try:
        number = whole_number(value, what, minimum=minimum)
    except ValueError as error:
        faults.append(f"{error}.")
        return None
    if abs(number) > _INT64_MAX:
        faults.append(f"{what} is beyond 63 bits.")
        return None
    return number


def _show(shape: tuple[int, ...]) -> str:
    return short_repr(shape)
