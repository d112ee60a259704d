"""State dicts cut into parts. Which tensors can be written is tested in ``tests/loaders/test_save.py``."""

import numpy as np
import pytest

from asyncshard.pipeline.writing.state_tensors import split_state


@pytest.mark.parametrize(
    ("limit", "parts"), [(None, [["a", "b", "c"]]), (8, [["a", "b"], ["c"]]), (1, [["a"], ["b"], ["c"]])]
)
def test_a_state_is_cut_in_its_own_order(limit, parts):
    state = {name: np.full(4, number, np.uint8) for number, name in enumerate("abc")}
    assert [[tensor.name for tensor in part] for part in split_state(state, limit)] == parts


def test_a_tensor_knows_the_names_that_it_goes_by_too():
    whole = np.ones((4, 4))
    (part,) = split_state({"a": whole, "tied": whole, "row": whole[0]}, None)
    (tensor,) = part
    assert {tensor.name, *tensor.other_names} == {"a", "tied"}
    assert tensor.nbytes == whole.nbytes
