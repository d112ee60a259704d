"""A model's ``config.json`` is read as a value, or refused in words that name it."""

import pytest

from asyncshard.errors import CheckpointError, FormatError, ObjectNotFoundError
from asyncshard.pipeline.checkpoint import config
from asyncshard.pipeline.checkpoint.config import read_config
from asyncshard.testing import MemoryStore


async def test_the_value_of_the_json_is_returned(threads):
    store = MemoryStore({"config.json": b'{"model_type": "llama", "layers": [1, 2]}'})
    assert await read_config(store, threads) == {"model_type": "llama", "layers": [1, 2]}


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 200_000], ids=["empty", "cut", "binary", "deep"])
async def test_what_is_no_json_is_an_error_that_names_the_file(threads, text):
    with pytest.raises(CheckpointError, match=r"memory://checkpoint/config\.json: this is not JSON") as caught:
        await read_config(MemoryStore({"config.json": text}), threads)
    assert caught.value.path == "memory://checkpoint/config.json"


async def test_a_config_that_is_not_there_is_not_found(threads):
    with pytest.raises(ObjectNotFoundError, match=r"config\.json"):
        await read_config(MemoryStore({}), threads)


async def test_a_file_too_large_for_a_config_is_not_read(threads, monkeypatch):
    monkeypatch.setattr(config, "_MAX_BYTES", 8)
    assert await read_config(MemoryStore({"config.json": b"[1,2,34]"}), threads) == [1, 2, 34]
    with pytest.raises(FormatError, match=r"config\.json"):
        await read_config(MemoryStore({"config.json": b"[1,2,3,4]"}), threads)
