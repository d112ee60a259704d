"""What the names of a directory say of a whole checkpoint, against what a loader of each rank says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import PP_TEMPLATE, ShardPattern
from asyncshard.plan.files.layout import INDEX_NAME, SINGLE_NAME, choose_layout, index_files
from asyncshard.plan.files.rank_shards import gaps
from asyncshard.plan.files.survey import survey_index, survey_names

PATTERN, PP_PATTERN = ShardPattern(), ShardPattern(PP_TEMPLATE)


def survey(*names, **options):
    return survey_names(names, path="/ckpt", **options)


def numbered(numbers, count):
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in numbers]


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1), st.integers(1, 5))
def test_a_survey_finds_no_fault_exactly_where_every_rank_can_be_chosen(shards, world_size):
    names = [PATTERN.format_for_rank(rank, part) for rank, part in sorted(shards)]
    found = survey(*names, world_size=world_size)
    chosen = []
    problems = set()
    for rank in range(world_size):
        try:
            chosen += choose_layout(names, path="/ckpt", rank=rank, world_size=world_size).files
        except CheckpointError as error:
            problems.add(str(error))
        except ObjectNotFoundError:
            problems.add("absent")
    assert bool(found.problems) == bool(problems)
    if not problems:
        assert sorted(found.files) == sorted(chosen) == sorted(names)
    if all(rank < world_size for rank, _ in shards):
        assert problems - {"absent"} <= set(found.problems)
        wanted = {(rank, 0) for rank in range(world_size)} - {(rank, 0) for rank, _ in shards}
        wanted |= {(rank, part) for rank, last in shards for part in range(last)} - shards
        assert found.num_missing == len(wanted)


@given(st.sets(st.integers(0, 60)), st.integers(61, 70))
def test_gaps_are_the_numbers_that_are_not_there(present, count):
    absent = sorted(set(range(count)) - present)
    assert gaps(sorted(present), count) == (absent[:20], len(absent))


def test_stages_that_have_no_file_are_a_fault():
    found = survey(*(PP_PATTERN.format_for_rank(0, 0, stage) for stage in (0, 3)))
    assert found.problems == (
        "/ckpt: there is no file of pp_rank 1, 2, though there are files of pp_rank 3. The checkpoint is incomplete.",
    )


def test_the_index_comes_before_the_single_file_and_ranks_before_both():
    names = [INDEX_NAME, SINGLE_NAME, PATTERN.format_for_rank(0, 0)]
    assert [survey(*names[:count]).kind for count in (3, 2, 1)] == ["ranks", "index", "index"]
    assert survey(SINGLE_NAME).kind == "single"
    assert survey("config.json").kind is None


def test_an_index_tells_its_files_apart_from_copies_and_others():
    names = [*numbered((1, 2), 2), *numbered((1,), 3), SINGLE_NAME, "consolidated.00.safetensors", "x.safetensors", "y"]
    found = survey_index(reversed(numbered((1, 2), 2)), names, path="/ckpt")
    assert found.files == tuple(numbered((1, 2), 2))
    assert set(found.others) == {*numbered((1,), 3), SINGLE_NAME, "consolidated.00.safetensors", "x.safetensors"}
    assert set(found.others) - set(found.copies) == {"x.safetensors"}
    assert found.problems == ()
    assert survey_index([SINGLE_NAME], [SINGLE_NAME], path="/ckpt").copies == ()


def test_a_file_that_the_index_names_and_the_directory_lacks_is_the_fault_that_a_loader_raises():
    with pytest.raises(ObjectNotFoundError) as caught:
        index_files(["a", "b"], ["a"], f"/ckpt/{INDEX_NAME}")
    assert survey_index(["a", "b"], ["a"], path="/ckpt").problems == (str(caught.value),)


@given(st.sets(st.integers(1, 30), min_size=1))
def test_shards_without_an_index_are_counted_by_their_names(numbers):
    found = survey(*numbered(numbers, 30))
    assert found.kind == "shards"
    assert found.files == tuple(numbered(sorted(numbers), 30))
    assert found.num_missing == 30 - len(numbers)
    assert found.missing == tuple(numbered(sorted(set(range(1, 31)) - numbers), 30)[:20])
    assert len(found.problems) == 1 + (len(numbers) < 30)


def test_numbers_out_of_range_and_absurd_ones_cost_nothing():
    found = survey("m-0-of-2.safetensors", "m-7-of-2.safetensors", f"m-1-of-{10**18 - 1}.safetensors")
    assert found.num_missing == 2
    found = survey(f"m-1-of-{10**18 - 1}.safetensors")
    assert found.num_missing == 10**18 - 2
    assert len(found.missing) == 20


def test_an_explicit_pattern_looks_for_nothing_else():
    found = survey(INDEX_NAME, *numbered((1,), 1), pattern=PATTERN)
    assert found.kind is None
    assert found.problems[0].startswith("/ckpt holds no checkpoint: looked for model-rank-{rank}")


def test_a_named_file_is_that_file():
    assert survey("x.bin", is_file=True).files == ("x.bin",)


@given(st.lists(st.text() | st.sampled_from([SINGLE_NAME, *numbered((1, 2), 2), "model-rank-0-part-0.safetensors"])))
def test_any_names_are_surveyed(names):
    found = survey_names(names, path="/ckpt")
    assert set(found.files) <= set(names)
    assert set(found.copies) <= set(found.others) <= set(names)
    assert not set(found.files) & set(found.others)
