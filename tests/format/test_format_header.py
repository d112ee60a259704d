"""The headers that `format_header` writes: `parse_header` and safetensors read them back."""

import json

import numpy as np
import pytest

from asyncshard.format.header import format_header, parse_header


def test_a_formatted_header_is_read_by_us_and_by_safetensors(checkpoints, tmp_path):
    from safetensors import safe_open

    tensors = {'odd " name \\ \u20ac \U0001f600\n': np.arange(6, dtype="<f4").reshape(2, 3), "empty": np.zeros((3, 0))}
    facts = [(name, "F32" if name != "empty" else "F64", a.shape, a.nbytes) for name, a in tensors.items()]
    head = format_header(facts, {"key": 'va"lue \u20ac'})
    assert len(head) % 8 == 0
    data = head + b"".join(array.tobytes() for array in tensors.values())
    header = parse_header(data)
    assert [(info.name, info.dtype, info.shape, info.nbytes) for info in header.values()] == facts
    assert header.metadata == {"key": 'va"lue \u20ac'}
    (tmp_path / "x.safetensors").write_bytes(data)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"key": 'va"lue \u20ac'}
        assert checkpoints.same({name: file.get_tensor(name) for name in tensors}, tensors)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_long_metadata_is_quoted_in_steps_and_read_as_it_was(shift):
    metadata = {"a": "x" * shift + '"\n\U0001f600' * 70_000, "b": "", "": "c"}
    head = format_header([], metadata)
    assert parse_header(head).metadata == metadata
    assert json.loads(head[8:]) == {"__metadata__": metadata}


def test_a_formatted_header_without_tensors_is_one():
    head = format_header([])
    assert json.loads(head[8:]) == {}
    assert len(parse_header(head)) == 0
