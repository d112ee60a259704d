"""Digests of tensors in a file's metadata."""

import json
from pathlib import Path

import numpy as np
import pytest
import xxhash

from asyncshard import parse_header, save_sharded_state
from asyncshard.errors import FormatError
from asyncshard.format.digests import digests_of

KEY = "asyncshard.xxh3_128"


def header(metadata):
    entries = {"__metadata__": metadata, "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
    text = json.dumps(entries).encode()
    return parse_header(len(text).to_bytes(8, "little") + text + b"ab")


async def test_the_writer_puts_the_digest_of_every_tensor_in_the_order_of_the_header(tmp_path, checkpoints):
    tensors = checkpoints.every_dtype()
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, np.ndarray)}
    tensors["empty"] = np.zeros((0, 3), np.float32)
    (path,) = await save_sharded_state(tensors, tmp_path, rank=0, digests=True, metadata={"note": "kept"})
    data = Path(path).read_bytes()
    read = parse_header(data)
    assert read.metadata["note"] == "kept"
    expected = [xxhash.xxh3_128_digest(data[info.start : info.stop]) for info in read.values()]
    assert [row.tobytes() for row in digests_of(read)] == expected


def test_a_file_without_digests_has_none():
    assert digests_of(header({})) is None


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 64, "g" * 32, "A" * 32, "\u00e9" * 32])
def test_malformed_digests_are_an_error(text):
    with pytest.raises(FormatError):
        digests_of(header({KEY: text}))
