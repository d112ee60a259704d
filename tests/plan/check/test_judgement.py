"""The report on a checkpoint of a few small headers. `tests/loaders/test_check.py` checks reports on real files."""

import json

import pytest

from asyncshard.errors import FormatError, ObjectNotFoundError, TruncatedError
from asyncshard.format.header import format_header, parse_header
from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.check.file_facts import facts_of
from asyncshard.plan.check.judgement import CheckInput, Problem, index_disagreement, report_on
from asyncshard.plan.files.survey import survey_index, survey_names

ONE = "model.safetensors"
FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
PATTERN = ShardPattern()


def facts(file, *names, dtype="F32", weight_map=None):
    text = format_header((name, dtype, (2,), 8 if dtype == "F32" else 4) for name in names)
    header = parse_header(text, len(text) + len(names) * (8 if dtype == "F32" else 4))
    number = None if weight_map is None else weight_map.files.index(file)
    return facts_of(file, header, header, weight_map, number)


def report(survey, *files, **options):
    return report_on(CheckInput("/ckpt", survey, {each.name: each for each in files}, **options))


def ranks(*files):
    return survey_names(files, path="/ckpt")


def test_a_whole_file_is_complete_and_counted():
    found = report(survey_names([ONE], path="/ckpt"), facts(ONE, "a", "b"))
    assert found.is_ok
    assert found.is_complete
    assert (found.layout, found.num_files, found.num_tensors, found.nbytes) == ("single", 1, 2, 16)
    assert [tuple(use) for use in found.dtypes] == [("F32", 2, 16)]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (FormatError("/ckpt/x: a rule is broken"), "/ckpt/x: a rule is broken; fetch or write it again."),
        (FormatError("/ckpt/x: too long; shorten it."), "/ckpt/x: too long; shorten it."),
        (TruncatedError("/ckpt/x ends early."), "/ckpt/x ends early."),
    ],
)
def test_a_damaged_file_is_a_sentence_and_makes_the_checkpoint_incomplete(error, sentence):
    survey = survey_names([ONE], path="/ckpt")
    found = report_on(CheckInput("/ckpt", survey, {ONE: error}))
    assert found.problems == (sentence,)
    assert not found.is_complete
    assert [tuple(damaged) for damaged in found.damaged] == [(ONE, str(error))]


def test_a_file_that_is_gone_is_missing_and_not_damaged():
    survey = survey_names([ONE], path="/ckpt")
    found = report_on(CheckInput("/ckpt", survey, {ONE: ObjectNotFoundError("/ckpt/x is not there.")}))
    assert (found.missing_files, found.num_missing_files, found.damaged, found.num_files) == ((ONE,), 1, (), 0)
    assert not found.is_complete


def test_a_damaged_file_beside_the_checkpoint_leaves_it_complete():
    survey = survey_names([ONE, "other.safetensors"], path="/ckpt")
    files = {ONE: facts(ONE, "a"), "other.safetensors": FormatError("/ckpt/other: broken")}
    found = report_on(CheckInput("/ckpt", survey, files))
    assert found.is_complete
    assert len(found.problems) == 2
    assert found.extra_files == ("other.safetensors",)


def test_files_beside_the_checkpoint_are_no_problem_for_a_user_who_gave_a_pattern():
    name = PATTERN.format_for_rank(0, 0)
    survey = survey_names([name, ONE], path="/ckpt", pattern=PATTERN)
    assert report(survey, facts(name, "a"), facts(ONE, "a")).copies == (ONE,)
    assert len(report(survey, facts(name, "a"), facts(ONE, "a")).problems) == 1
    assert report(survey, facts(name, "a"), facts(ONE, "a"), pattern=PATTERN).is_ok


def test_ranks_with_the_same_tensors_are_complete():
    one, two = (PATTERN.format_for_rank(rank, 0) for rank in (0, 1))
    assert report(ranks(one, two), facts(one, "a", "b"), facts(two, "b", "a")).is_ok


def test_a_rank_that_differs_in_names_is_incomplete_and_one_that_differs_in_dtypes_is_not():
    one, two = (PATTERN.format_for_rank(rank, 0) for rank in (0, 1))
    other_names = report(ranks(one, two), facts(one, "a", "b"), facts(two, "a", "c"))
    (problem,) = other_names.problems
    assert "rank 1 differs from rank 0: it lacks 1 tensor ('b'); it has 1 tensor ('c') that the other lacks" in problem
    assert not other_names.is_complete
    other_dtypes = report(ranks(one, two), facts(one, "a"), facts(two, "a", dtype="BF16"))
    (problem,) = other_dtypes.problems
    assert "1 tensor ('a') of another dtype" in problem
    assert other_dtypes.is_complete


def test_a_tensor_in_two_files_is_a_problem():
    survey = survey_index([FIRST, SECOND], [FIRST, SECOND], path="/ckpt")
    found = report(survey, facts(FIRST, "a", "b"), facts(SECOND, "b"))
    assert f"'b' in {FIRST} and {SECOND}" in found.problems[0]
    assert not found.is_complete


def test_an_index_and_a_header_that_disagree_are_a_problem():
    from asyncshard.format.index import parse_index

    weight_map = parse_index(json.dumps({"weight_map": {"a": FIRST, "b": FIRST, "c": SECOND}}).encode(), path=None)
    survey = survey_index([FIRST, SECOND], [FIRST, SECOND], path="/ckpt")
    found = report(survey, facts(FIRST, "a", weight_map=weight_map), facts(SECOND, "c", "d", weight_map=weight_map))
    assert len(found.problems) == 2
    assert f"/ckpt/{FIRST}: the index and the file disagree: weight_map places 'b' in it" in found.problems[0]
    assert "it holds 'd', which weight_map does not place there" in found.problems[1]


def test_names_that_agree_are_no_error():
    assert index_disagreement("x", [], []) is None


def test_a_disagreement_has_the_names_of_both_sides():
    error = index_disagreement("x", ["a"], ["b"])
    assert error is not None
    assert (error.path, error.missing, error.unexpected) == ("x", ("a",), ("b",))


def test_problems_of_reading_come_first_and_only_fatal_ones_make_a_checkpoint_incomplete():
    survey = survey_names([ONE], path="/ckpt")
    found = report(survey, facts(ONE, "a"), problems=(Problem("config.json cannot be read.", False),))
    assert found.problems == ("config.json cannot be read.",)
    assert found.is_complete
    found = report(survey, facts(ONE, "a"), problems=(Problem("The index cannot be read.", True),))
    assert not found.is_complete


CAUSAL = {"architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("config", "names", "is_complete"),
    [
        ({**CAUSAL, "tie_word_embeddings": False}, ["model.embed_tokens.weight"], False),
        ({**CAUSAL, "tie_word_embeddings": False}, ["model.embed_tokens.weight", "lm_head.weight"], True),
        ({**CAUSAL, "tie_word_embeddings": True}, ["model.embed_tokens.weight"], True),
        (CAUSAL, ["model.embed_tokens.weight"], True),
        ({"architectures": ["BertModel"], "tie_word_embeddings": False}, ["model.embed_tokens.weight"], True),
        (None, ["model.embed_tokens.weight"], True),
    ],
)
def test_an_output_layer_is_missing_only_if_the_config_says_that_it_is_not_tied(config, names, is_complete):
    found = report(survey_names([ONE], path="/ckpt"), facts(ONE, *names), config=config)
    assert found.is_complete == is_complete


def test_a_tie_of_the_config_is_in_the_report():
    config = {**CAUSAL, "tie_word_embeddings": True}
    found = report(survey_names([ONE], path="/ckpt"), facts(ONE, "model.embed_tokens.weight"), config=config)
    assert [tuple(tie) for tie in found.ties] == [("lm_head.weight", "model.embed_tokens.weight")]
