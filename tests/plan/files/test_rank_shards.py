"""The rank shards among file names, and the problems that the names alone show.

`test_layout` checks the problems as a loader raises them, and `test_survey` as a check lists them.
"""

import pytest

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import PP_TEMPLATE, ShardName, ShardPattern
from asyncshard.plan.files.rank_shards import (
    absent_ranks,
    find_rank_shards,
    gaps,
    missing_ranks,
    problems_of_parts,
    problems_of_rank,
    problems_of_world,
)

PATTERN, PP_PATTERN = ShardPattern(), ShardPattern(PP_TEMPLATE)


def shards_of(*numbers, pattern=PATTERN):
    """Return the rank shards of a directory that has files of these (rank, part, pp_rank)."""
    (shards,) = find_rank_shards([pattern.format_for_rank(*each) for each in numbers], "/ckpt", None)
    return shards


def test_only_names_that_match_a_known_pattern_are_rank_shards():
    names = ["model-rank-0-part-0.safetensors", "model.safetensors", "model-rank-0-part-0.safetensors.bak"]
    (shards,) = find_rank_shards(names, "/ckpt", None)
    assert shards.names == {names[0]: ShardName(0, 0, 0)}
    assert find_rank_shards(names[1:], "/ckpt", None) == []


def test_a_given_pattern_is_the_only_one_that_is_looked_for():
    names = ["model-rank-0-part-0.safetensors", "x-3-7"]
    (shards,) = find_rank_shards(names, "/ckpt", ShardPattern("x-{rank}-{part}"))
    assert shards.names == {"x-3-7": ShardName(0, 3, 7)}


def test_names_of_both_known_patterns_are_two_sets():
    names = [PATTERN.format_for_rank(0, 0), PP_PATTERN.format_for_rank(0, 0, 0)]
    assert [shards.pattern for shards in find_rank_shards(names, "/ckpt", None)] == [PATTERN, PP_PATTERN]


def test_owners_and_their_parts_come_in_numeric_order():
    shards = shards_of((10, 0), (2, 10), (2, 9), (2, 0))
    assert shards.owners == [ShardName(0, 2, 0), ShardName(0, 10, 0)]
    assert list(shards.parts_of(ShardName(0, 2, 0))) == [0, 9, 10]
    assert shards.by_owner() == {owner: shards.parts_of(owner) for owner in shards.owners}
    assert [list(parts) for parts in shards.by_owner().values()] == [[0, 9, 10], [0]]


def test_messages_call_a_rank_with_its_stage_only_where_names_have_one():
    assert shards_of((3, 0)).called(ShardName(0, 3, 0)) == "rank 3"
    assert shards_of((3, 0, 1), pattern=PP_PATTERN).called(ShardName(1, 3, 0)) == "pp_rank 1 rank 3"


def test_a_rank_that_can_be_loaded_has_no_problem():
    shards = shards_of((0, 0), (0, 1), (1, 0))
    assert list(problems_of_rank(shards, ShardName(0, 0, 0), 2)) == []


def test_a_rank_without_files_is_an_error_that_lists_those_that_have():
    (problem,) = problems_of_rank(shards_of((0, 0), (2, 0)), ShardName(0, 1, 0), 3)
    assert isinstance(problem, ObjectNotFoundError)
    assert "no file of rank 1" in str(problem)
    assert "it has ranks 0, 2" in str(problem)


def test_problems_of_a_world_are_ranks_outside_of_it_and_two_files_of_one_part():
    (shards,) = find_rank_shards(
        ["model-rank-0-part-0.safetensors", "model-rank-0-part-00.safetensors", "model-rank-5-part-0.safetensors"],
        "/ckpt",
        None,
    )
    outside, twice = problems_of_world(shards, 2)
    assert "files of rank 5, outside a world of 2" in str(outside)
    assert "model-rank-0-part-0.safetensors and model-rank-0-part-00.safetensors" in str(twice)
    assert (outside.path, twice.path) == ("/ckpt", "/ckpt")


def test_a_missing_part_below_the_last_is_a_problem():
    shards = shards_of((0, 0), (0, 3))
    (problem,) = problems_of_parts(shards, ShardName(0, 0, 0), [0, 3])
    assert isinstance(problem, CheckpointError)
    assert "rank 0 lacks 2 parts of 0 to 3: 1, 2" in str(problem)
    assert list(problems_of_parts(shards, ShardName(0, 0, 0), [0])) == []


def test_absent_ranks_are_told_for_each_stage_and_ranks_outside_of_the_world_do_not_count():
    shards = shards_of((0, 0, 0), (1, 0, 1), (7, 0, 1), pattern=PP_PATTERN)
    assert list(absent_ranks(shards, 3)) == [(0, [1, 2], 2), (1, [0, 2], 2)]


def test_missing_ranks_and_stages_are_problems():
    texts = [str(problem) for problem in missing_ranks(shards_of((0, 0, 0), (0, 0, 2), pattern=PP_PATTERN), 2)]
    assert len(texts) == 3
    assert "pp_rank 0 has no file of rank 1, in a world of 2" in texts[0]
    assert "pp_rank 2 has no file of rank 1, in a world of 2" in texts[1]
    assert "no file of pp_rank 1" in texts[2]


@pytest.mark.parametrize(
    ("present", "count", "missing"),
    [([], 0, ([], 0)), ([], 2, ([0, 1], 2)), ([0, 1], 2, ([], 0)), ([1, 4], 6, ([0, 2, 3, 5], 4))],
)
def test_gaps_are_the_missing_numbers_and_their_count(present, count, missing):
    assert gaps(present, count) == missing


def test_an_absurd_number_of_gaps_is_counted_and_not_enumerated():
    first, total = gaps([10**18], 10**18 + 1)
    assert (first, total) == (list(range(20)), 10**18)
