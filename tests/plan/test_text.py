"""Counts, lists and collected problems in messages."""

import pytest

from asyncshard.errors import CheckpointError
from asyncshard.plan.text import LISTED, Problems, count_of, enumerate_names, ranks_of


def test_a_count_is_plural_unless_it_is_one():
    assert [count_of(number, "file") for number in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_a_short_list_of_names_is_whole():
    assert enumerate_names([]) == ""
    assert enumerate_names(["a", "b"]) == "a, b"
    assert enumerate_names(["a", "b"], is_quoted=True) == "'a', 'b'"
    assert enumerate_names(["a", "b"], separator="; ") == "a; b"


def test_a_long_list_of_names_counts_those_that_are_left_out():
    names = [str(number) for number in range(LISTED + 3)]
    assert enumerate_names(names) == ", ".join(names[:LISTED]) + " and 3 more"
    assert enumerate_names(names, 2) == f"0, 1 and {LISTED + 1} more"


def test_a_list_of_the_first_names_counts_up_to_the_total():
    assert enumerate_names(["a", "b"], total=5) == "a, b and 3 more"
    assert enumerate_names(["a", "b"], total=2) == "a, b"


def test_ranks_are_singular_only_for_one_rank_in_all():
    assert ranks_of([0]) == "rank 0"
    assert ranks_of([0, 2]) == "ranks 0, 2"
    assert ranks_of([0], total=3) == "ranks 0 and 2 more"
    assert ranks_of(range(25)).endswith("18, 19 and 5 more")


def test_no_problem_raises_nothing():
    Problems("/ckpt").require_none()


def test_problems_are_raised_as_one_error_with_a_line_each():
    problems = Problems("/ckpt")
    problems.add("the first")
    problems.add("the second")
    with pytest.raises(CheckpointError) as caught:
        problems.require_none()
    assert caught.value.path == "/ckpt"
    assert str(caught.value).splitlines()[1:] == ["  the first", "  the second"]


def test_very_many_problems_are_counted():
    problems = Problems("/ckpt")
    for number in range(LISTED + 5):
        problems.add(f"problem {number}")
    with pytest.raises(CheckpointError, match=rf"problem {LISTED - 1} and 5 more$") as caught:
        problems.require_none()
    assert f"problem {LISTED}" not in str(caught.value)
