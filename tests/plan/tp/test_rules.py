"""The rules of a plan that match a name, the most exact first, and kinds of names that match the same rules.

`test_plan` checks the matching through plans, and `test_kinds_core` the kinds against names matched one by one.
"""

import pytest

from asyncshard.format.header import format_header, parse_header
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.rules import RuleIndex

NAME = "model.layers.7.self_attn.q_proj.weight"


def found(keys, name):
    return [rule.key for rule in RuleIndex({key: Shard(0) for key in keys}).find(name)]


def test_matching_rules_come_from_the_exact_parameter_to_the_module_with_any_number():
    keys = [
        "model.layers.*.self_attn.q_proj",
        "model.layers.7.self_attn.q_proj",
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.7.self_attn.q_proj.weight",
    ]
    assert found(keys, NAME) == keys[::-1]
    assert found(reversed(keys), NAME) == keys[::-1]


def test_a_name_without_a_rule_finds_nothing():
    assert found(["layers.*.mlp"], NAME) == []
    assert found([], NAME) == []


@pytest.mark.parametrize("name", ["layers.3.w.weight", "model.layers.3.w.weight"])
@pytest.mark.parametrize("key", ["layers.*.w", "model.layers.*.w"])
def test_the_prefix_may_be_missing_on_either_side(key, name):
    assert found([key], name) == [key]


def test_a_rule_keeps_its_key_and_its_value():
    (rule,) = RuleIndex({"layers.*.w": "colwise"}).find("layers.1.w.bias")
    assert (rule.key, rule.value) == ("layers.*.w", "colwise")


def kinds(keys, *names):
    table = parse_header(format_header((name, "U8", (0,), 0) for name in names)).table
    numbers, firsts = RuleIndex({key: Shard(0) for key in keys}).kinds(table)
    return numbers.tolist(), firsts.tolist()


def test_names_that_differ_only_in_numbers_are_of_one_kind():
    assert kinds(["layers.*.w"], "layers.0.w", "layers.1.w", "layers.0.v", "layers.10.v") == ([0, 0, 1, 1], [0, 2])


def test_each_name_is_a_kind_of_its_own_where_a_rule_names_a_number():
    assert kinds(["layers.1.w"], "layers.0.w", "layers.1.w", "layers.2.w") == ([0, 1, 2], [0, 1, 2])


def test_digits_within_words_are_numbers_only_where_a_rule_stars_them():
    assert kinds(["layers.*"], "layers.w1", "layers.w2") == ([0, 1], [0, 1])
    assert kinds(["layers.w*"], "layers.w1", "layers.w2") == ([0, 0], [0])
