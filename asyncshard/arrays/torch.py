"""Torch tensors: the tensors of ``framework="pt"``, and torch destinations.

Delivered tensors are views of the pipeline's buffers on the CPU, without a copy. Destinations are written through their
storage, so parameters that require grad, bf16 and 0-d tensors work; autograd does not see the write.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from asyncshard._core import Lease, Span
from asyncshard.arrays.base import RawArray
from asyncshard.arrays.numpy import NumpyArrays
from asyncshard.errors import DestinationError
from asyncshard.format.dtypes import Dtype, by_name

DTYPES = {
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""The torch dtype of each element type of the format. F6 has none, and is delivered as raw bytes. One F4 element of
torch holds two F4 elements of the file."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TorchTensors:
    """The array library of ``framework="pt"``."""

    def view(self, lease: Lease | None, offset: int, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> Any:
        kind, shape = _layout(dtype, shape, nbytes)
        if lease is None:
            return torch.empty(shape, dtype=kind)
        flat = torch.frombuffer(lease, dtype=kind, count=nbytes // kind.itemsize, offset=offset)
        return flat if len(shape) == 1 else flat.view(shape)

    def memory_of(self, name: str, destination: Any) -> RawArray:
        if not isinstance(destination, torch.Tensor):
            return NumpyArrays().memory_of(name, destination)
        problem = _problem(destination)
        if problem:
            raise DestinationError(f"the destination of {name!r} {problem}", tensor=name)
        tensor = destination.detach()
        size = tensor.element_size()
        if size not in (1, 2, 4, 8):
            raise DestinationError(
                f"the destination of {name!r} has dtype {tensor.dtype}, which no tensor has", tensor=name
            )
        shape, span, strides = tuple(tensor.shape), tensor.numel() * size, None
        if not tensor.is_contiguous():
            strides = [stride * size for stride in tensor.stride()]
            span = sum(stride * (count - 1) for stride, count in zip(strides, shape, strict=True)) + size
        memory: Any = Span(tensor.data_ptr(), span, tensor)
        array = np.ndarray(shape, f"u{size}", memory, 0, strides)
        kind = _NAMES.get(tensor.dtype)
        return RawArray(array, by_name[kind] if kind else None)

    def shape_of(self, dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> tuple[int, ...]:
        return _layout(dtype, shape, nbytes)[1]


def _layout(dtype: Dtype, shape: tuple[int, ...], nbytes: int) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the torch dtype and shape of a tensor: those of its raw bytes if torch has no dtype that fits."""
    if dtype.bits % 8 == 0:
        return DTYPES[dtype.name], shape
    if dtype.name == "F4" and shape and shape[-1] % 2 == 0:
        return DTYPES["F4"], (*shape[:-1], shape[-1] // 2)
    return torch.uint8, (nbytes,)


def _problem(tensor: torch.Tensor) -> str | None:
    """Return why the CPU cannot write a tensor's memory, or None if it can."""
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}; only strided tensors can be filled"
    if tensor.is_meta:
        return "is on the meta device and has no memory; make it real first (Module.to_empty)"
    if tensor.device.type != "cpu":
        return f"is on {tensor.device}; give a CPU tensor, or a Sink that copies to the device"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazy conjugate or negative view; resolve it first"
    return None


library = TorchTensors()
