"""The text of a save's id in a file's metadata."""

import pytest

from asyncshard.format.save_id import SAVE_KEY, SaveId, save_id_of


def test_an_id_comes_back_from_its_text():
    save = SaveId("0123456789abcdef" * 2, 12)
    assert save_id_of({SAVE_KEY: str(save), "step": "3"}) == save


def test_metadata_without_the_key_names_no_save():
    assert save_id_of({"step": "3"}) is None


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 32, "0" * 32 + " 0", "0" * 32 + " -1", "A" * 32 + " 1", "0" * 32 + " \u0661"]
)
def test_a_text_of_another_form_is_an_id_that_tells_no_number_of_files(text):
    assert save_id_of({SAVE_KEY: text}) == SaveId(text, None)
