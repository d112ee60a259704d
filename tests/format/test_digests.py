"""Digests in a header's metadata: read back as they were written, or an error that says what is wrong."""

import sys

import numpy as np
import pytest

from asyncshard import parse_header
from asyncshard.errors import FormatError
from asyncshard.format.digests import DIGESTS_KEY, digests_of, has_digests, load_digest


@pytest.fixture
def header(checkpoints):
    def make(text, count=3):
        tensors = checkpoints.tensors(count, nbytes=8)
        return parse_header(checkpoints.shard(tensors, metadata=None if text is None else {DIGESTS_KEY: text}))

    return make


def test_each_tensor_has_a_row_in_file_order(header):
    rows = np.random.default_rng(0).integers(0, 256, (3, 16), np.uint8)
    found = digests_of(header(rows.tobytes().hex()))
    assert found.dtype == np.uint8
    assert np.array_equal(found, rows)


def test_a_header_without_the_key_has_no_digests(header):
    assert digests_of(header(None)) is None
    assert not has_digests(header(None))
    assert has_digests(header("nonsense"))


def test_a_file_without_tensors_has_no_digests(header):
    assert digests_of(header("", count=0)).shape == (0, 16)


def test_digests_longer_than_a_block_are_decoded_whole(header):
    rows = np.random.default_rng(0).integers(0, 256, (20_000, 16), np.uint8)
    assert np.array_equal(digests_of(header(rows.tobytes().hex(), count=20_000)), rows)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 characters, and 3 tensors need 96"),
        ("0" * 95, "95 characters"),
        ("0" * 97, "97 characters"),
        ("0" * 50 + "G" + "0" * 45, "character 50, 'G'"),
        ("0" * 95 + "A", "character 95, 'A'"),
        (" " + "0" * 95, "character 0, ' '"),
        ("0" * 95 + "é", "outside of ASCII"),
    ],
)
def test_malformed_digests_are_an_error_that_names_the_file(header, text, problem):
    with pytest.raises(FormatError) as caught:
        digests_of(header(text), path="/a/b")
    assert problem in str(caught.value)
    assert str(caught.value).startswith("/a/b: ")
    assert caught.value.path == "/a/b"


@pytest.mark.parametrize("nbytes", [0, 1, 1000, (1 << 20) - 1, 1 << 20, (3 << 20) + 5])
def test_the_digest_of_a_buffer_is_xxh3_of_128_bits_whatever_its_length(nbytes):
    xxhash = pytest.importorskip("xxhash")
    octets = np.random.default_rng(1).bytes(nbytes)
    assert load_digest()(octets) == xxhash.xxh3_128_digest(octets)


def test_the_digest_of_an_array_is_that_of_its_bytes():
    pytest.importorskip("xxhash")
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    assert load_digest()(array) == load_digest()(array.tobytes())


def test_missing_xxhash_is_an_error_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match=r"xxhash is not installed: pip install 'asyncshard\[cache\]'"):
        load_digest()
