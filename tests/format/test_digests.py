"""Digests in a header's metadata: read back as they were written, or an error that says what is wrong."""

import numpy as np
import pytest

from asyncshard import parse_header
from asyncshard.errors import FormatError
from asyncshard.format.digests import DIGESTS_KEY, digests_of, has_digests


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


def test_a_header_without_the_key_has_none(header):
    assert digests_of(header(None)) is None
    assert not has_digests(header(None))
    assert has_digests(header("nonsense"))


def test_a_file_without_tensors_has_no_rows(header):
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
