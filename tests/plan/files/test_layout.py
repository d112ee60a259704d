import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard.errors import CheckpointError, ObjectNotFoundError
from asyncshard.format.pattern import PP_TEMPLATE, ShardPattern
from asyncshard.plan.files.layout import (
    Layout,
    choose_layout,
    index_files,
    is_whole_model,
    natural_key,
    validate_rank,
)

PATTERN = ShardPattern()
PP_PATTERN = ShardPattern(PP_TEMPLATE)


def choose(*names, **options):
    return choose_layout(names, path="/ckpt", **options)


def shards(*ranks_and_parts):
    return [PATTERN.format_for_rank(rank, part) for rank, part in ranks_and_parts]


@given(st.integers(1, 30), st.integers(1, 4), st.data())
def test_a_rank_gets_its_own_parts_in_numeric_order(num_parts, world_size, data):
    names = shards(*((rank, part) for rank in range(world_size) for part in range(num_parts)))
    noise = ["config.json", "model.safetensors.index.json", "model.safetensors", names[0] + ".bak"]
    rank = data.draw(st.integers(0, world_size - 1))
    layout = choose(*data.draw(st.permutations(names + noise)), rank=rank, world_size=world_size)
    assert layout == Layout("ranks", tuple(PATTERN.format_for_rank(rank, part) for part in range(num_parts)))


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_gap_is_an_error_that_names_the_missing_parts(parts):
    names = shards(*((0, part) for part in parts))
    missing = [part for part in range(max(parts)) if part not in parts]
    if not missing:
        assert len(choose(*names).files) == len(parts)
        return
    with pytest.raises(CheckpointError) as caught:
        choose(*names)
    listed = ", ".join(map(str, missing[:20])) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
    assert f": {listed}. The checkpoint is incomplete." in str(caught.value)
    assert caught.value.path == "/ckpt"


def test_one_far_part_lists_twenty_missing_and_counts_the_rest():
    with pytest.raises(CheckpointError, match="and 999999999999999978 more"):
        choose(*shards((0, 0), (0, 10**18 - 1)))


def test_gaps_of_other_ranks_and_absent_ranks_do_not_matter():
    names = shards((1, 0), (2, 0), (2, 5))
    assert choose(*names, rank=1, world_size=4).files == tuple(shards((1, 0)))


def test_no_file_for_this_rank_says_which_ranks_are_there():
    with pytest.raises(ObjectNotFoundError, match=r"no file of rank 3 .* it has ranks 0, 2\."):
        choose(*shards((0, 0), (2, 0)), rank=3, world_size=4)
    with pytest.raises(ObjectNotFoundError, match=r"no file of pp_rank 1 rank 0 .* no \{pp_rank\}"):
        choose(*shards((0, 0)), pp_rank=1)


def test_ranks_outside_the_world_are_listed():
    with pytest.raises(CheckpointError, match=r"holds files of ranks 2, 10, outside a world of 2: pass the world_size"):
        choose(*shards((0, 0), (10, 0), (2, 0), (2, 1)), world_size=2)
    with pytest.raises(CheckpointError, match="files of rank 1, outside"):
        choose(*shards((1, 0)))


def test_two_names_of_one_part_are_listed():
    names = ["model-rank-0-part-1.safetensors", "model-rank-0-part-01.safetensors", *shards((0, 0))]
    with pytest.raises(CheckpointError) as caught:
        choose(*names)
    assert "model-rank-0-part-01.safetensors and model-rank-0-part-1.safetensors" in str(caught.value)


def test_a_name_listed_twice_is_one_file():
    assert choose(*shards((0, 0), (0, 0))).files == tuple(shards((0, 0)))


def test_pipeline_shards_are_found_without_a_pattern():
    names = [PP_PATTERN.format_for_rank(rank, part, pp) for pp in (0, 1) for rank in (0, 1) for part in range(11)]
    layout = choose(*names, rank=1, world_size=2, pp_rank=1)
    assert layout == Layout("ranks", tuple(PP_PATTERN.format_for_rank(1, part, 1) for part in range(11)))
    with pytest.raises(ObjectNotFoundError, match="it has pp_rank 0 rank 0, pp_rank 0 rank 1, pp_rank 1 rank 0, "):
        choose(*names, rank=1, world_size=2, pp_rank=2)


def test_pipeline_ranks_are_not_duplicates_of_each_other():
    names = [PP_PATTERN.format_for_rank(0, 0, pp) for pp in (0, 1)]
    assert choose(*names).files == (names[0],)


def test_both_patterns_in_one_directory_need_a_choice():
    names = [*shards((0, 0)), PP_PATTERN.format_for_rank(0, 0)]
    with pytest.raises(CheckpointError, match="two checkpoints"):
        choose(*names)
    assert choose(*names, pattern=PATTERN).files == (names[0],)
    assert choose(*names, pattern=PP_PATTERN).files == (names[1],)


def test_hugging_face_directories_are_told_apart():
    index, single = "model.safetensors.index.json", "model.safetensors"
    assert choose("a.txt", single, index) == Layout("index", (index,))
    assert choose("a.txt", single, rank=1, world_size=2) == Layout("single", (single,))


def test_an_explicit_pattern_allows_nothing_else():
    pattern = ShardPattern("w{rank}_{part}.st")
    assert choose("w0_0.st", "model.safetensors", pattern=pattern) == Layout("ranks", ("w0_0.st",))
    for names in (["model.safetensors"], ["model.safetensors.index.json"], shards((0, 0))):
        with pytest.raises(ObjectNotFoundError, match=r"looked for w\{rank\}_\{part\}\.st"):
            choose(*names, pattern=pattern)
    with pytest.raises(CheckpointError, match="pass the directory"):
        choose("w0_0.st", is_file=True, pattern=pattern)


def test_a_named_file_is_that_file():
    assert choose("anything.bin", is_file=True) == Layout("single", ("anything.bin",))
    assert choose(*shards((5, 7)), is_file=True).kind == "single"
    for names in ([], ["a", "b"]):
        with pytest.raises(ValueError, match="expected its one name"):
            choose(*names, is_file=True)


def test_no_checkpoint_says_what_was_looked_for_and_what_is_there():
    with pytest.raises(ObjectNotFoundError, match=r"has no \.safetensors file") as caught:
        choose("readme.md")
    for wanted in ("model-rank-{rank}-part-{part}", "model.safetensors.index.json", "or model.safetensors;"):
        assert wanted in str(caught.value)
    names = [f"shard-{number}.safetensors" for number in range(12)]
    with pytest.raises(FileNotFoundError, match=r"shard-2\.safetensors, .*shard-9\.safetensors and 2 more\."):
        choose(*names)


def test_index_files_come_in_numeric_order_once_each():
    names = [f"model-{number:05}-of-00010.safetensors" for number in range(1, 11)]
    mapped = names * 2
    random.Random(0).shuffle(mapped)
    assert index_files(mapped, [*names, "other"], "/ckpt") == tuple(names)
    assert index_files(["s-10", "s-2", "sub/s-3"], ["s-2", "s-10"], "/ckpt") == ("s-2", "s-10", "sub/s-3")
    assert index_files([], [], "/ckpt") == ()


def test_files_that_only_the_index_knows_are_listed():
    with pytest.raises(ObjectNotFoundError, match="names 2 files that the directory lacks: s-2, s-10"):
        index_files(["s-10", "s-2", "s-1"], ["s-1"], "/ckpt")
    with pytest.raises(ObjectNotFoundError, match="s-19 and 5 more"):
        index_files([f"s-{number}" for number in range(25)], [], "/ckpt")


@given(st.lists(st.text("a0129-.٣²", max_size=8) | st.text()))
def test_natural_key_orders_every_name_and_tells_all_apart(names):
    keys = [natural_key(name) for name in names]
    assert len({str(key) for key in keys}) == len(set(names))
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


@given(st.text("ab-", max_size=4), st.integers(0, 10**6), st.integers(0, 10**6), st.text("ab-", max_size=4))
def test_natural_key_orders_numbers_as_numbers(head, one, two, tail):
    first, second = f"{head}{one}{tail}", f"{head}{two}{tail}"
    assert (natural_key(first) < natural_key(second)) == (one < two)


def test_natural_key_takes_numbers_of_any_length():
    assert natural_key("1" * 5000) < natural_key("1" * 4999 + "2")


@pytest.mark.parametrize(
    "arguments",
    [(-1, 1), (1, 1), (0, 0), (0, -1), (0, 1, -1), (0.0, 1), ("0", 1), (0, None), (0, 1, 0.5), (True, 2)],
)
def test_ranks_out_of_range_are_value_errors(arguments):
    with pytest.raises(ValueError):
        validate_rank(*arguments)


def test_ranks_in_range_pass():
    validate_rank(0, 1)
    validate_rank(np.int64(3), 4, 7)
    with pytest.raises(ValueError, match="outside the world"):
        choose("model.safetensors", rank=1)


# Whether the files are all that a model has


@pytest.mark.parametrize(
    ("layout", "is_file", "is_whole"),
    [
        (Layout("index", ("model.safetensors.index.json",)), False, True),
        (Layout("single", ("model.safetensors",)), False, True),
        (Layout("single", ("model.safetensors",)), True, True),
        (Layout("single", ("other.safetensors",)), True, True),
        (Layout("single", ("model-00001-of-00002.safetensors",)), True, False),
        (Layout("single", ("model-rank-0-part-0.safetensors",)), True, False),
        (Layout("ranks", ("model-rank-0-part-0.safetensors",)), False, True),
        (Layout("ranks", ("model-pp-0-tp-0-part-0.safetensors",)), False, False),
    ],
)
def test_a_model_is_whole_but_for_one_file_of_several_and_a_pipeline_stage(layout, is_file, is_whole):
    assert is_whole_model(layout, is_file=is_file) is is_whole


def test_a_pattern_tells_the_stages():
    layout = Layout("ranks", ("s0-r0-p0.safetensors",))
    for template, is_whole in (
        ("s{pp_rank}-r{rank}-p{part}.safetensors", False),
        ("s0-r{rank}-p{part}.safetensors", True),
    ):
        assert is_whole_model(layout, is_file=False, pattern=ShardPattern(template)) is is_whole
