"""The element types agree with the format's table, with the compiled parser's and with NumPy."""

import ml_dtypes
import numpy as np
import pytest

from asyncshard.format.dtypes import DTYPES, by_name, from_numpy
from asyncshard.format.header import parse_header

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


def test_the_types_are_those_of_the_format_in_its_order():
    assert [(dtype.name, dtype.bits) for dtype in DTYPES] == list(BITS.items())
    assert {name: dtype.bits for name, dtype in by_name.items()} == BITS


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_the_parser_knows_each_type_and_its_size(dtype):
    nbytes = 4 * dtype.bits // 8
    text = f'{{"a":{{"dtype":"{dtype.name}","shape":[4],"data_offsets":[0,{nbytes}]}}}}'.encode()
    header = parse_header(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    assert header["a"].dtype == dtype.name
    assert DTYPES[header.table.dtype_codes[0]] is dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_the_numpy_dtype_of_an_element_type_has_its_size_and_leads_back_to_it(dtype):
    if dtype.numpy is None:
        assert dtype.bits % 8 != 0
    else:
        assert dtype.numpy.itemsize * 8 == dtype.bits
        assert from_numpy(dtype.numpy) is dtype
        assert from_numpy(np.empty(3, dtype.numpy).dtype) is dtype


@pytest.mark.parametrize("dtype", [">f4", "S3", "O", "c16", "M8[s]", ml_dtypes.float4_e2m1fn, ml_dtypes.int4])
def test_a_numpy_dtype_that_the_format_cannot_store_unchanged_has_no_element_type(dtype):
    assert from_numpy(np.dtype(dtype)) is None
