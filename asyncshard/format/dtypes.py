"""The 22 element types of the safetensors format, and their NumPy dtypes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Dtype(NamedTuple):
    """An element type of the format."""

    name: str
    """The name in a header, such as ``"BF16"``; upper and lower case differ."""
    bits: int
    """The size of one element in bits. Elements of 4 and 6 bits are packed."""
    numpy: np.dtype[np.generic] | None
    """The little-endian NumPy dtype; None for packed types, whose tensors are delivered as ``uint8``."""


DTYPES: tuple[Dtype, ...] = (
    Dtype("BOOL", 8, np.dtype(np.bool_)),
    Dtype("F4", 4, None),
    Dtype("F6_E2M3", 6, None),
    Dtype("F6_E3M2", 6, None),
    Dtype("U8", 8, np.dtype("u1")),
    Dtype("I8", 8, np.dtype("i1")),
    Dtype("F8_E5M2", 8, np.dtype(ml_dtypes.float8_e5m2)),
    Dtype("F8_E4M3", 8, np.dtype(ml_dtypes.float8_e4m3fn)),
    Dtype("F8_E8M0", 8, np.dtype(ml_dtypes.float8_e8m0fnu)),
    Dtype("F8_E4M3FNUZ", 8, np.dtype(ml_dtypes.float8_e4m3fnuz)),
    Dtype("F8_E5M2FNUZ", 8, np.dtype(ml_dtypes.float8_e5m2fnuz)),
    Dtype("I16", 16, np.dtype("<i2")),
    Dtype("U16", 16, np.dtype("<u2")),
    Dtype("F16", 16, np.dtype("<f2")),
    Dtype("BF16", 16, np.dtype(ml_dtypes.bfloat16)),
    Dtype("I32", 32, np.dtype("<i4")),
    Dtype("U32", 32, np.dtype("<u4")),
    Dtype("F32", 32, np.dtype("<f4")),
    Dtype("C64", 64, np.dtype("<c8")),
    Dtype("F64", 64, np.dtype("<f8")),
    Dtype("I64", 64, np.dtype("<i8")),
    Dtype("U64", 64, np.dtype("<u8")),
)
"""The element types in the order of the format; a dtype code of the compiled parser is an index into this tuple."""

by_name: Mapping[str, Dtype] = MappingProxyType({dtype.name: dtype for dtype in DTYPES})
"""The element types by their names in a header."""

_BY_NUMPY = {dtype.numpy: dtype for dtype in DTYPES if dtype.numpy is not None}


def from_numpy(dtype: np.dtype[np.generic]) -> Dtype | None:
    """Return the element type that stores the bytes of a NumPy `dtype` unchanged, or None if the format has none.

    The result for a big-endian dtype is None, because its bytes would have to be swapped.
    """
    return _BY_NUMPY.get(dtype)


if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("asyncshard reads the bytes of little-endian tensors as they are: it needs such a machine")
