"""The tensors of a state dict as they are written: names, bytes, dtypes, and which part of a rank each goes into."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard.arrays.frameworks import load_library
from asyncshard.arrays.subtensors import SubtensorFilter
from asyncshard.errors import DestinationError
from asyncshard.format.dtypes import Dtype, from_numpy


class StateTensor(NamedTuple):
    """One tensor to be written."""

    name: str
    array: NDArray[Any]
    """Its memory as unsigned integers, contiguous or not."""
    dtype: Dtype
    other_names: tuple[str, ...] = ()
    """Names of tensors that are left out, because they are this one."""

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


def split_state(state_dict: Mapping[str, Any], max_shard_size: int | None) -> list[list[StateTensor]]:
    """Cut a state dict into parts, in its own order. Slow for many tensors: call it in a thread.

    Raises
    ------
    ValueError, TypeError
        A tensor or a name that the format cannot hold.
    """
    parts: list[list[StateTensor]] = [[]]
    size = 0
    for tensor in _tensors(state_dict):
        if max_shard_size is not None and parts[-1] and size + tensor.nbytes > max_shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def _tensors(state_dict: Mapping[str, Any]) -> Iterator[StateTensor]:
    kept = SubtensorFilter.filter_subtensors(state_dict)
    others = _names_left_out(state_dict, kept)
    for name, value in kept.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {name!r}")
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named '__metadata__': the format keeps that name for itself")
        array, dtype = _raw(name, value)
        yield StateTensor(name, array, dtype, tuple(others.get(_identity(value, array), ())))


def _names_left_out(state_dict: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[Hashable, list[str]]:
    """Return the names of the tensors that were left out, by what they are."""
    names: dict[Hashable, list[str]] = {}
    for name, value in state_dict.items():
        if name not in kept and isinstance(name, str):
            with contextlib.suppress(ValueError):  # of a dtype that cannot be written: it is none of those that are
                array, _ = _raw(name, value)
                names.setdefault(_identity(value, array), []).append(name)
    return names


def _identity(value: Any, array: NDArray[Any]) -> Hashable:
    """Return what two tensors have in common that are the same."""
    return array.__array_interface__["data"][0], str(value.dtype), array.shape, array.strides


def _raw(name: str, value: Any) -> tuple[NDArray[Any], Dtype]:
    """Return a tensor's memory as unsigned integers, and its dtype."""
    if isinstance(value, np.ndarray):
        value = value.view(np.ndarray).astype(value.dtype.newbyteorder("<"), copy=False)
        dtype = from_numpy(value.dtype)
        array = value if dtype is None else value.view(f"u{value.dtype.itemsize}")
    else:
        try:
            array, dtype = load_library("pt").memory_of(name, value)
        except DestinationError as error:
            raise ValueError(
                f"tensor {name!r} cannot be written: it must be a strided tensor on the CPU, with memory of its own "
                f"and a dtype that safetensors files can hold, not {value.dtype}, {value.layout}, {value.device}"
            ) from error
        if dtype is not None and dtype.bits < 8 and not array.shape:
            raise ValueError(
                f"tensor {name!r} cannot be written: a {value.dtype} needs a dimension, as it is two elements"
            )
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {value.dtype}, which safetensors files cannot hold")
    return array, dtype
