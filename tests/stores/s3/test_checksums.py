"""Checksums of objects that are read in ranges."""

import base64
import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.stores.s3.checksums import _CRCS, Coverage, crc_of, matches, stored_checksum


def encoded(value, nbytes):
    return base64.b64encode(value.to_bytes(nbytes, "big")).decode()


@pytest.mark.parametrize("crc", _CRCS, ids=lambda crc: crc.name)
def test_check_values_are_those_of_the_catalogue(crc):
    # Of the text "123456789": CRC-64/NVME, CRC-32/ISCSI and CRC-32/ISO-HDLC in the CRC RevEng catalogue.
    known = {"CRC64NVME": 0xAE8B14860A799888, "CRC32C": 0xE3069283, "CRC32": 0xCBF43926}
    text = memoryview(b"123456789")
    assert crc_of(crc, [text]) == crc_of(crc, [text[:4], text[4:4], text[4:]]) == known[crc.name]


def test_a_large_piece_of_memory_is_one_value():
    data = np.random.default_rng(0).bytes((2 << 20) + 3)
    assert crc_of(_CRCS[2], [memoryview(data)]) == zlib.crc32(data)


@given(cuts=st.lists(st.integers(1, 999), unique=True, max_size=8), head=st.integers(0, 1000), draw=st.data())
def test_ranges_in_any_order_make_up_the_whole(cuts, head, draw):
    data = np.random.default_rng(7).bytes(1000)
    first_start = draw.draw(st.sampled_from([0, *[cut for cut in cuts if cut <= head]]))
    bounds = [first_start, *sorted(cut for cut in cuts if cut > first_start), 1000]
    ranges = list(itertools.pairwise(bounds))
    for crc in _CRCS:
        coverage = Coverage(crc, 1000, data[:head])
        for start, stop in draw.draw(st.permutations(ranges)):
            coverage.add(start, stop, crc_of(crc, [memoryview(data)[start:stop]]))
        assert coverage.whole() == crc_of(crc, [memoryview(data)])


def test_a_hole_or_an_overlap_has_no_value():
    crc, data = _CRCS[0], memoryview(bytes(100))
    for ranges in ([(10, 100)], [(0, 50), (60, 100)], [(0, 60), (50, 100)], []):
        coverage = Coverage(crc, 100, b"")
        for start, stop in ranges:
            coverage.add(start, stop, crc_of(crc, [data[start:stop]]))
        assert coverage.whole() is None


def test_only_values_of_whole_objects_count():
    value = encoded(zlib.crc32(b"abc"), 4)
    assert stored_checksum({"x-amz-checksum-crc32": value}).value == zlib.crc32(b"abc").to_bytes(4, "big")
    assert stored_checksum({"x-amz-checksum-crc32": value, "x-amz-checksum-type": "FULL_OBJECT"}) is not None
    for headers in (
        {},
        {"x-amz-checksum-crc32": value, "x-amz-checksum-type": "COMPOSITE"},
        {"x-amz-checksum-crc32": f"{value}-3"},
        {"x-amz-checksum-crc32": "AAAA"},
        {"x-amz-checksum-crc32": "\xff"},
        {"x-amz-checksum-sha1": value},
    ):
        assert stored_checksum(headers) is None


def test_sha256_is_compared_in_one_piece():
    digest = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0="  # FIPS 180-2, appendix B.1
    checksum = stored_checksum({"x-amz-checksum-sha256": digest})
    assert matches(checksum, [memoryview(b"a"), memoryview(b"bc")])
    assert not matches(checksum, [memoryview(b"abd")])
