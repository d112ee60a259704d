"""Whether files are those of one save."""

import pytest

from asyncshard.errors import ObjectChangedError
from asyncshard.format.save_id import SaveId
from asyncshard.plan.files.saves import save_problem

ONE, TWO = SaveId("1" * 32, 2), SaveId("2" * 32, 2)


@pytest.mark.parametrize(
    "saves", [[], [None], [None, None, None], [ONE, ONE], [SaveId("x", None)], [SaveId("x", None)] * 3]
)
def test_files_of_one_save_and_files_that_do_not_tell_are_right(saves):
    assert save_problem([(f"f{number}", save) for number, save in enumerate(saves)], "path") is None


@pytest.mark.parametrize(
    ("saves", "text"),
    [
        ([ONE, TWO], "path: f0 and f1 come from two saves"),
        ([ONE, ONE, TWO], "path: f0 and f2 come from two saves"),
        ([ONE, None], "path: f0 and f1 come from two saves"),
        ([None, ONE], "path: f0 and f1 come from two saves"),
        ([ONE, ONE._replace(parts=3)], "path: f0 and f1 come from two saves"),
        ([ONE], "path: f0 comes from a save of 2 files, and there is 1"),
        ([ONE, ONE, ONE], "path: f0 comes from a save of 2 files, and there are 3"),
    ],
)
def test_files_of_two_saves_or_of_a_part_of_one_are_an_error_that_says_which(saves, text):
    problem = save_problem([(f"f{number}", save) for number, save in enumerate(saves)], "path")
    assert isinstance(problem, ObjectChangedError)
    assert str(problem).startswith(text)
    assert problem.retryable
