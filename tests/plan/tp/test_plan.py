import pickle
import subprocess
import sys

import pytest
import torch.distributed.tensor as torch_tensor
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributed.tensor.placement_types import _StridedShard

from asyncshard.errors import NamesError
from asyncshard.format.header import format_header, parse_header
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard
from asyncshard.plan.tp.plan import TpPlan


def table_of(*names):
    return parse_header(format_header((name, "U8", (0,), 0) for name in names)).table


NAME = "model.layers.7.self_attn.q_proj.weight"
KEYS = [
    "model.layers.7.self_attn.q_proj.weight",
    "layers.7.self_attn.q_proj.weight",
    "model.layers.*.self_attn.q_proj.weight",
    "layers.*.self_attn.q_proj.weight",
    "model.layers.7.self_attn.q_proj",
    "layers.7.self_attn.q_proj",
    "model.layers.*.self_attn.q_proj",
    "layers.*.self_attn.q_proj",
]
"""From the most exact one to the least, in pairs that mean the same."""


# Names


@pytest.mark.parametrize("name", [NAME, NAME.removeprefix("model.")])
@pytest.mark.parametrize("key", KEYS)
def test_a_rule_is_found_by_parameter_or_module_with_or_without_the_prefix(name, key):
    plan = TpPlan({key: Shard(1)}, unmatched="error")
    assert plan.placement_of(name, (8, 8)) == Shard(1)
    assert plan.match([name]) == ((), ())
    plan.check([table_of(name)])


@pytest.mark.parametrize("name", [NAME, NAME.removeprefix("model.")])
@pytest.mark.parametrize("exact", range(0, 8, 2))
@pytest.mark.parametrize("other", range(0, 8, 2))
def test_the_most_exact_rule_goes_first_wherever_it_stands(name, exact, other):
    if exact < other:
        first, second = (KEYS[exact], Shard(0)), (KEYS[other + 1], Shard(1))
        assert TpPlan(dict([first, second])).placement_of(name, (8, 8)) == Shard(0)
        assert TpPlan(dict([second, first])).placement_of(name, (8, 8)) == Shard(0)


@pytest.mark.parametrize(
    "key",
    [
        "layers",
        "layers.*",
        "layers.*.self_attn",
        "layers.*.self_attn.*",
        "layers.8.self_attn.q_proj",
        "layers.77.self_attn.q_proj",
        "layers.*.self_attn.q_pro",
        "layers.*.self_attn.q_proj.bias",
        "layers.*.*.q_proj",
        "*",
        "self_attn.q_proj",
        "odel.layers.*.self_attn.q_proj",
        "model.model.model.layers.*.self_attn.q_proj",
        "layersX*.self_attn.q_proj",
        "layers.[0-9].self_attn.q_proj",
        r"layers.\d.self_attn.q_proj",
        "layers.7*.self_attn.q_proj",
        "LAYERS.*.self_attn.q_proj",
        " layers.*.self_attn.q_proj",
        "layers.*.self_attn.q_proj.",
        ".layers.*.self_attn.q_proj",
        "model.",
    ],
)
def test_a_star_is_a_number_and_nothing_else_matches_by_half(key):
    plan = TpPlan({key: "colwise"})
    assert plan.placement_of(NAME, (8, 8)) == Replicate()
    with pytest.raises(NamesError) as caught:
        plan.check([table_of(NAME)], path="/ckpt")
    assert caught.value.missing == (key,)
    assert repr(key) in str(caught.value)
    assert caught.value.path == "/ckpt"


def test_neighbouring_numbers_are_numbers_each():
    assert TpPlan({"blocks.*.*.w": Shard(1)}).placement_of("blocks.3.14.w.weight", (8, 8)) == Shard(1)
    assert TpPlan({"blocks.*.14.w": Shard(1)}).placement_of("blocks.3.14.w.weight", (8, 8)) == Shard(1)
    assert TpPlan({"blocks.*.15.w": Shard(1)}).placement_of("blocks.3.14.w.weight", (8, 8)) == Replicate()


def test_a_number_at_the_end_of_a_name_is_a_number():
    assert TpPlan({"biases.*": Shard(0)}).placement_of("biases.12", (8,)) == Shard(0)
    assert TpPlan({"head.*": Shard(0)}).placement_of("head.0.weight", (8, 8)) == Shard(0)


def test_numbers_within_words_may_be_said_or_starred_as_in_older_transformers():
    for key in ("layers.*.mlp.w1", "layers.*.mlp.w*", "layers.3.mlp.w*", "layers.3.mlp.w1"):
        assert TpPlan({key: Shard(1)}).placement_of("model.layers.3.mlp.w1.weight", (8, 8)) == Shard(1)
    plan = TpPlan({"layers.*.mlp.w*": Shard(1), "layers.*.mlp.w2": Shard(0), "layers.*.attn": Shard(0)})
    assert plan.placement_of("layers.3.mlp.w2.weight", (8, 8)) == Shard(0)
    assert plan.placement_of("layers.3.mlp.w3.weight", (8, 8)) == Shard(1)
    assert plan.placement_of("layers.3.attn.weight", (8, 8)) == Shard(0)
    assert TpPlan({"layers.*.mlp.w1": Shard(1)}).placement_of("layers.3.mlp.w2.weight", (8, 8)) == Replicate()


def test_an_exact_parameter_excepts_it_from_its_module():
    plan = TpPlan({"layers.*.o_proj": "rowwise", "layers.*.o_proj.bias": Shard(0), "layers.1.o_proj": "replicate"})
    assert plan.placement_of("layers.0.o_proj.weight", (8, 8)) == Shard(-1)
    assert plan.placement_of("layers.0.o_proj.bias", (8,)) == Shard(0)
    assert plan.placement_of("layers.1.o_proj.weight", (8, 8)) == Replicate()


def test_a_rule_behind_a_more_exact_one_is_used():
    plan = TpPlan({"layers.*.o_proj": "rowwise", "layers.*.o_proj.weight": Shard(0)})
    assert plan.match(["layers.0.o_proj.weight"]).unused == ()


@example("", "0*")
@given(st.text(max_size=30), st.text(min_size=1, max_size=30))
def test_no_name_and_no_key_breaks_the_matching(name, key):
    plan = TpPlan({key: Shard(0), "a.*": Shard(0)})
    assert plan.placement_of(name, (4, 4)) in (Shard(0), Replicate())
    plan.match([name, key])
    assert TpPlan({key: Shard(1)}).placement_of(key, (4, 4)) == Shard(1)


# What no rule matches, and rules that match nothing


def test_unmatched_names_are_whole_or_refused():
    names = [f"norms.{index}.weight" for index in range(30)]
    assert TpPlan({}).placement_of(names[0], (8,)) == Replicate()
    TpPlan({}).check([table_of(*names)])
    plan = TpPlan({}, unmatched="error")
    with pytest.raises(NamesError, match=r"norms\.0\.weight"):
        plan.placement_of(names[0], (8,))
    with pytest.raises(
        NamesError, match=r"^/ckpt: .*'norms.19.weight' and 10 more\. .*unmatched='replicate'"
    ) as caught:
        plan.check([table_of(*names)], path="/ckpt")
    assert caught.value.unexpected == tuple(names)
    assert "norms.20.weight" not in str(caught.value)
    assert plan.match(names).unmatched == tuple(names)


def test_all_names_of_a_table_are_listed_though_one_of_a_kind_is_looked_at():
    names = [f"layers.{index}.{module}.weight" for index in range(9) for module in ("a", "b")]
    TpPlan({"layers.*.a": Shard(0)}).check([table_of(*names)])
    with pytest.raises(NamesError) as caught:
        TpPlan({"layers.*.a": Shard(0)}, unmatched="error").check([table_of(*names)], path="/ckpt")
    assert caught.value.unexpected == tuple(names[1::2])
    with pytest.raises(NamesError) as caught:
        TpPlan({"layers.*.c": Shard(0)}).check([table_of(*names)], path="/ckpt")
    assert caught.value.missing == ("layers.*.c",)


def test_rules_that_match_nothing_are_listed_twenty_at_most():
    rules = {f"layers.*.p{index}": "colwise" for index in range(25)}
    with pytest.raises(NamesError, match=r"'layers.\*.p19' and 5 more") as caught:
        TpPlan(rules).check([table_of("layers.0.weight")])
    assert caught.value.missing == tuple(rules)
    assert caught.value.path is None


# Placements of torch


def test_placements_of_torch_are_taken():
    plan = TpPlan({"a": torch_tensor.Shard(1), "b": torch_tensor.Shard(-1), "c": torch_tensor.Replicate()})
    assert plan == TpPlan({"a": Shard(1), "b": Shard(-1), "c": Replicate()})
    assert plan.placement_of("a.weight", (8, 8)) == Shard(1)


@pytest.mark.parametrize("placement", [torch_tensor.Partial(), _StridedShard(0, split_factor=2)])
def test_placements_that_no_file_can_hold_are_refused(placement):
    with pytest.raises(ValueError, match=f"torch's {type(placement).__name__} is not"):
        TpPlan({"a": placement})


# Values


@pytest.mark.parametrize("value", [None, 0, 1.5, True, ["colwise"], {"dim": 0}, b"colwise", Shard, object()])
def test_a_value_is_a_word_or_a_placement(value):
    with pytest.raises(TypeError, match=r"'layers\.\*\.q_proj' needs a word or a placement"):
        TpPlan({"layers.*.q_proj": value})


@pytest.mark.parametrize("rules", [None, "auto", ["a"], [("a", "colwise")], 3])
def test_the_rules_are_a_mapping(rules):
    with pytest.raises(TypeError, match="tp_plan must be a mapping"):
        TpPlan(rules)


def test_a_key_is_a_text_that_is_not_empty():
    for key in (None, 3, b"a", ("a",)):
        with pytest.raises(TypeError, match="a name must be a text"):
            TpPlan({key: "colwise"})
    with pytest.raises(ValueError, match="must not be empty"):
        TpPlan({"": "colwise"})


@pytest.mark.parametrize("unmatched", ["Error", "", None, 1, True, []])
def test_unmatched_is_one_of_two_words(unmatched):
    with pytest.raises(ValueError, match="'replicate' or 'error'"):
        TpPlan({}, unmatched=unmatched)


def test_two_rules_for_the_same_names_must_agree():
    with pytest.raises(ValueError, match=r"'layers.\*.q' and 'model.layers.\*.q' mean the same names but differ"):
        TpPlan({"model.layers.*.q": "colwise", "layers.*.q": "rowwise"})
    plan = TpPlan({"model.layers.*.q": "colwise", "layers.*.q": "colwise"})
    plan.check([table_of("layers.0.q.weight")])


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plan_is_a_value(protocol):
    rules = {"layers.*.q": "colwise", "layers.3.w*": torch_tensor.Shard(0), "e": PackedShard(0, (2, 1))}
    plan = TpPlan(rules, unmatched="error")
    copy = pickle.loads(pickle.dumps(plan, protocol))
    assert copy == plan
    assert hash(copy) == hash(plan)
    assert copy.placement_of("layers.3.w1.weight", (8, 8)) == Shard(0)
    assert plan != TpPlan(rules)
    assert plan != TpPlan({**rules, "e": Replicate()}, unmatched="error")
    assert TpPlan(dict(reversed(rules.items())), unmatched="error") == plan
    assert plan != "auto"
    assert "layers.*.q" in repr(plan)
    with pytest.raises(AttributeError):
        plan.unmatched = "replicate"
    with pytest.raises(AttributeError):
        plan._rules = {}
    with pytest.raises(AttributeError):
        del plan._rules
    with pytest.raises(TypeError):
        plan.rules["x"] = "colwise"
    rules["x"] = "colwise"
    assert "x" not in plan.rules


def test_torch_is_not_imported_for_a_plan():
    code = (
        "import sys, asyncshard.plan.tp.models as m\n"
        "m.auto_plan({'model_type': 'llama', 'num_attention_heads': 8}, 2)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_hundred_thousand_names_are_looked_up_once_each():
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(100_000)]
    plan = TpPlan({"layers.*.mlp.up_proj": "colwise"}, unmatched="error")
    plan.check([table_of(*names)])
    assert {plan.placement_of(name, (8, 8)) for name in names} == {Shard(-2)}
