"""The marks of what is being written, among the names of a directory."""

import pickle

import pytest

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import PP_TEMPLATE, ShardName, ShardPattern
from asyncshard.plan.files.incomplete import incomplete_rank, marked_rank, marked_ranks, rank_mark
from asyncshard.plan.files.layout import choose_layout
from asyncshard.plan.files.rank_shards import KNOWN_PATTERNS
from asyncshard.plan.files.survey import survey_names

PARTS = [f"model-rank-{rank}-part-{part}.safetensors" for rank in range(2) for part in range(2)]


@pytest.mark.parametrize("template", [ShardPattern().template, PP_TEMPLATE, "x{part}-{pp_rank}.{rank}"])
def test_a_mark_tells_the_rank_it_was_made_for(template):
    pattern = ShardPattern(template)
    pp_rank = 3 if pattern.has_pp_rank else 0
    name = rank_mark(pattern, 7, pp_rank)
    assert marked_rank(name, pattern) == ShardName(pp_rank, 7, 0)
    assert pattern.parse(name) is None
    assert list(marked_ranks([*PARTS, name], [pattern])) == [(name, ShardName(pp_rank, 7, 0))]


@pytest.mark.parametrize("name", [*PARTS[:1], "x.asyncshard-incomplete", "asyncshard.incomplete", ""])
def test_other_names_are_no_marks(name):
    assert list(marked_ranks([name], KNOWN_PATTERNS)) == []


@pytest.mark.parametrize("others", [[], PARTS, ["model.safetensors"], ["model.safetensors.index.json"]])
def test_a_marked_rank_is_refused_whatever_else_there_is(others):
    names = [*others, rank_mark(ShardPattern(), 0, 0)]
    with pytest.raises(CheckpointError, match="/m: rank 0 is incomplete") as caught:
        choose_layout(names, path="/m", world_size=2)
    assert caught.value.retryable
    assert pickle.loads(pickle.dumps(caught.value)).retryable


def test_the_ranks_beside_a_marked_one_are_chosen():
    names = [*PARTS, rank_mark(ShardPattern(), 0, 0)]
    assert choose_layout(names, path="/m", rank=1, world_size=2).files == tuple(PARTS[2:])
    with pytest.raises(ObjectNotFoundError):
        choose_layout(names[4:], path="/m", rank=1, world_size=2)


def test_the_mark_of_another_pattern_is_of_no_matter():
    names = [*PARTS, rank_mark(ShardPattern("other-{rank}-{part}"), 0, 0)]
    assert choose_layout(names, path="/m", world_size=2).files == tuple(PARTS[:2])


def test_a_survey_tells_of_every_marked_rank():
    names = [*PARTS, *(rank_mark(ShardPattern(), rank, 0) for rank in range(2))]
    problems = survey_names(names, path="/m").problems
    expected = [str(incomplete_rank("/m", name, ShardName(0, rank, 0))) for rank, name in enumerate(names[4:])]
    assert list(problems) == expected
