import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.format.pattern import PP_TEMPLATE, ShardName, ShardPattern

NUMBERS = st.integers(0, 10**18 - 1)
LITERALS = st.text(st.characters(exclude_characters="{}/\\\0"), max_size=8)
SEPARATORS = LITERALS.filter(lambda text: any(char not in "0123456789" for char in text))


def test_default_pattern_names_and_reads_what_vllm_writes():
    pattern = ShardPattern()
    assert pattern.format_for_rank(3) == "model-rank-3-part-*.safetensors"
    assert pattern.format_for_rank(3, 12) == "model-rank-3-part-12.safetensors"
    assert pattern.parse_filename("model-rank-3-part-12.safetensors") == (3, 12)
    assert pattern.parse("model-rank-3-part-12.safetensors") == ShardName(pp_rank=0, rank=3, part=12)
    assert not pattern.has_pp_rank


def test_pipeline_pattern_reads_both_ranks():
    pattern = ShardPattern(PP_TEMPLATE)
    assert pattern.has_pp_rank
    assert pattern.format_for_rank(1, 2, pp_rank=3) == "model-pp-3-tp-1-part-2.safetensors"
    assert pattern.parse("model-pp-3-tp-1-part-2.safetensors") == ShardName(3, 1, 2)
    assert pattern.parse_filename("model-pp-3-tp-1-part-2.safetensors") == (1, 2)


@pytest.mark.parametrize(
    "name",
    [
        "model-rank-0-part-0.safetensors\n",
        "\nmodel-rank-0-part-0.safetensors",
        "model-rank-0-part-0.safetensors.bak",
        "model-rank-0-part-0.safetensors.safetensors",
        "dir/model-rank-0-part-0.safetensors",
        "xmodel-rank-0-part-0.safetensors",
        "model-rank-0-part-0xsafetensors",
        "model-rank--part-0.safetensors",
        "model-rank--1-part-0.safetensors",
        "model-rank-+1-part-0.safetensors",
        "model-rank-1_0-part-0.safetensors",
        "model-rank- 1-part-0.safetensors",
        "model-rank-٣-part-0.safetensors",
        "model-rank-²-part-0.safetensors",
        "model-rank-0-part-*.safetensors",
        "MODEL-rank-0-part-0.safetensors",
        "model-rank-" + "1" * 19 + "-part-0.safetensors",
        "model-rank-" + "1" * 5000 + "-part-0.safetensors",
        "",
    ],
)
def test_a_name_that_only_resembles_a_shard_does_not_match(name):
    assert ShardPattern().parse_filename(name) is None


def test_leading_zeros_are_read():
    assert ShardPattern().parse_filename("model-rank-003-part-00.safetensors") == (3, 0)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("", "{rank} is missing"),
        ("model-{part}.safetensors", "{rank} is missing"),
        ("model-{pp_rank}-{part}.safetensors", "{rank} is missing"),
        ("model-{rank}.safetensors", "{part} is missing"),
        ("{rank}-{tp_rank}-{part}", "the same thing"),
        ("{rank}-{rank}-{part}", "more than once"),
        ("{tp_rank}-{part}-{part}", "more than once"),
        ("{rank}-{part}-{pp_rank}-{pp_rank}", "more than once"),
        ("{rank}-{part}-{epoch}", "unknown placeholder {epoch}"),
        ("{rank}-{part}-{}", "unknown placeholder {}"),
        ("{rank:03d}-{part}", "unknown placeholder {rank:03d}"),
        ("{rank!r}-{part}", "unknown placeholder {rank!r}"),
        ("{ rank}-{part}", "unknown placeholder"),
        ("{RANK}-{part}", "unknown placeholder"),
        ("{rank-{part}", "brace"),
        ("{rank}-{part}}", "brace"),
        ("{{rank}}-{part}", "brace"),
        ("{rank}{part}", "between two placeholders"),
        ("{rank}00{part}", "between two placeholders"),
        ("shards/{rank}-{part}", "path separator"),
        ("shards\\{rank}-{part}", "path separator"),
        ("{rank}-{part}\0", "path separator"),
        (7, "a template is a str"),
    ],
)
def test_a_bad_template_is_refused_with_its_reason(template, complaint):
    with pytest.raises(ValueError) as caught:
        ShardPattern(template)
    assert complaint in str(caught.value)


def test_regex_specials_of_a_template_stand_for_themselves():
    pattern = ShardPattern("a.b*[{rank}]+({part})$^|?.st")
    name = pattern.format_for_rank(1, 2)
    assert name == "a.b*[1]+(2)$^|?.st"
    assert pattern.parse_filename(name) == (1, 2)
    assert pattern.parse_filename("axb*[1]+(2)$^|?.st") is None
    assert pattern.parse_filename("a.b*1+(2)$^|?.st") is None


def test_digits_beside_a_placeholder_are_literal():
    pattern = ShardPattern("v1{rank}2-3{part}4")
    assert pattern.format_for_rank(5, 6) == "v152-364"
    assert pattern.parse_filename("v152-364") == (5, 6)
    assert pattern.parse_filename("v12-364") is None


@pytest.mark.parametrize(
    "arguments",
    [(-1,), (0, -1), (0, 0, -1), (0, 0, 1), (0, "1"), (0, "**"), (0.0,), ("0",), (None,), (10**18,)],
)
def test_formatting_refuses_numbers_that_could_not_be_read_back(arguments):
    with pytest.raises(ValueError):
        ShardPattern().format_for_rank(*arguments)


def test_pattern_is_a_frozen_value():
    pattern = ShardPattern("x-{rank}-{part}")
    assert repr(pattern) == "ShardPattern(template='x-{rank}-{part}')"
    assert pattern == ShardPattern("x-{rank}-{part}") != ShardPattern()
    assert len({pattern, ShardPattern("x-{rank}-{part}"), ShardPattern()}) == 2
    copy = pickle.loads(pickle.dumps(pattern))
    assert copy == pattern
    assert copy.parse_filename("x-1-2") == (1, 2)
    with pytest.raises(AttributeError):
        pattern.template = "y"


@given(
    LITERALS, SEPARATORS, SEPARATORS, LITERALS, st.permutations(["rank", "part", "pp_rank"]), NUMBERS, NUMBERS, NUMBERS
)
def test_a_formatted_name_reads_back_for_every_template(head, one, two, tail, order, rank, part, pp_rank):
    pattern = ShardPattern(f"{head}{{{order[0]}}}{one}{{{order[1]}}}{two}{{{order[2]}}}{tail}")
    name = pattern.format_for_rank(rank, part, pp_rank)
    assert pattern.parse(name) == ShardName(pp_rank, rank, part)
    assert pattern.parse(name + "\n") is None
    assert pattern.parse("/" + name) is None
