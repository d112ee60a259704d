"""Tensor filters made of names, globs and predicates."""

import pytest

from asyncshard.plan.tensor_filter import TensorFilter


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("a.b", {"a.b"}),
        ("a.*", {"a.b", "a.c.d"}),
        (["a.b", "x?"], {"a.b", "xy"}),
        ({"[ax]*"}, {"a.b", "a.c.d", "xy"}),
        (lambda name: name.endswith("d"), {"a.c.d"}),
        (iter(["xy"]), {"xy"}),
    ],
)
def test_a_filter_is_names_globs_or_a_predicate(wanted, expected):
    wanted = TensorFilter(wanted)
    assert {name for name in ("a.b", "a.c.d", "xy", "A.b") if wanted(name)} == expected


@pytest.mark.parametrize("wanted", [5, [5], ["a", None]])
def test_a_filter_of_other_things_is_an_error(wanted):
    with pytest.raises(TypeError, match="tensor_filter must"):
        TensorFilter(wanted)


def test_a_filter_without_a_name_is_an_error():
    with pytest.raises(ValueError, match="names no tensor"):
        TensorFilter([])


def test_the_names_of_a_filter_are_the_texts_that_are_no_globs():
    assert TensorFilter(["a.b", "c.*", "d?", "[e]"]).names == {"a.b"}
    assert TensorFilter("a").names == {"a"}
    assert TensorFilter(lambda name: True).names == frozenset()


@pytest.mark.parametrize("glob", ["a*", "a?", "[a]b", "*[a]b"])
def test_a_glob_matches_the_whole_name_and_distinguishes_case(glob):
    selected = TensorFilter(glob)
    assert selected("ab")
    assert not selected("Ab")
    assert not selected("xabx")


def test_the_result_of_a_predicate_is_made_a_bool():
    selected = TensorFilter(lambda name: name.count("a"))
    assert selected("banana") is True
    assert selected("x") is False
