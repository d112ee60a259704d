"""Loading the files of one rank: which files, which names, into which memory."""

import errno
import json
import logging
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

import asyncshard
from asyncshard import ShardedStateLoader, ShardPattern
from asyncshard.errors import (
    AccessDeniedError,
    BudgetError,
    CheckpointError,
    DestinationError,
    FormatError,
    NamesError,
    NotRegularFileError,
    ObjectNotFoundError,
)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def weights():
    rng = np.random.default_rng(1)
    return {
        "a.weight": rng.standard_normal((64, 48)).astype(np.float32),
        "a.bias": rng.standard_normal(64).astype(np.float16),
        "b.count": np.array(7, np.int64),
        "b.empty": np.zeros((0, 5), np.float32),
        "b.mask": rng.integers(0, 2, 33).astype(np.bool_),
        "c.weight": rng.integers(-100, 100, (3, 5, 7)).astype(np.int8),
        "c.bf16": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
    }


def same(got, expected):
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name
    return True


def blank(weights, value=99):
    """Return a state dict of the same shapes, filled with something else."""
    state = {}
    for name, array in weights.items():
        state[name] = np.empty_like(array)
        state[name].reshape(-1).view(np.uint8)[...] = value
    return state


def untouched(state, value=99):
    return all((np.ascontiguousarray(array).reshape(-1).view(np.uint8) == value).all() for array in state.values())


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "asyncshard"]


# Which files


async def test_parts_are_read_in_numeric_order(tmp_path, checkpoints):
    parts = [{f"t{part}": np.array([part], np.int32)} for part in range(12)]
    checkpoints.write_ranks(tmp_path, *parts)
    loader = ShardedStateLoader()
    found = await loader.discover_shards(tmp_path)
    assert found == [str(tmp_path / f"model-rank-0-part-{part}.safetensors") for part in range(12)]
    assert list(await loader.load_weights(tmp_path)) == [f"t{part}" for part in range(12)]
    assert [name async for name, _ in loader.iterate_weights(tmp_path)] == [f"t{part}" for part in range(12)]


async def test_leading_zeros_are_numbers_too(tmp_path, checkpoints):
    for number, text in enumerate(["000", "1", "02"]):
        checkpoints.write_file(tmp_path / f"model-rank-00-part-{text}.safetensors", {f"t{number}": np.zeros(1)})
    assert list(await asyncshard.load(tmp_path)) == ["t0", "t1", "t2"]


async def test_tensors_come_by_file_offset_whatever_the_header_says(tmp_path):
    header = {
        "z": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]},
        "m": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "one.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\1\2\3")
    got = await asyncshard.load(tmp_path / "one.safetensors")
    assert [(name, array[0]) for name, array in got.items()] == [("m", 1), ("z", 2), ("a", 3)]


async def test_only_this_ranks_files_are_opened(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"mine": np.arange(3)}, rank=1)
    (tmp_path / "model-rank-0-part-0.safetensors").write_bytes(b"not a checkpoint")
    os.mkfifo(tmp_path / "model-rank-0-part-1.safetensors")
    loader = ShardedStateLoader(rank=1, world_size=2)
    assert same(await loader.load_weights(tmp_path), {"mine": np.arange(3)})


async def test_each_rank_gets_its_own_tensors(tmp_path, checkpoints):
    for rank in range(3):
        checkpoints.write_ranks(tmp_path, {"w": np.full(4, rank)}, rank=rank)
    for rank in range(3):
        got = await ShardedStateLoader(rank=rank, world_size=3).load_weights(tmp_path)
        assert got["w"].tolist() == [rank] * 4


@pytest.mark.parametrize("stray", ["{}.bak", "x{}", "{}.tmp", ".{}", "{}\n"])
async def test_names_that_only_resemble_the_pattern_are_left_alone(stray, tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(3)})
    (tmp_path / stray.format("model-rank-0-part-1.safetensors")).write_bytes(b"rubbish")
    assert same(await asyncshard.load(tmp_path), {"w": np.arange(3)})


async def test_a_gap_in_the_parts_is_an_error_that_names_it(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, *({f"t{part}": np.zeros(1)} for part in range(5)))
    (tmp_path / "model-rank-0-part-1.safetensors").unlink()
    (tmp_path / "model-rank-0-part-3.safetensors").unlink()
    for call in (ShardedStateLoader().discover_shards, ShardedStateLoader().load_weights):
        with pytest.raises(CheckpointError, match=r"2 parts of 0 to 4: 1, 3"):
            await call(tmp_path)


async def test_a_first_part_that_is_missing_is_a_gap(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"a": np.zeros(1)}, {"b": np.zeros(1)})
    (tmp_path / "model-rank-0-part-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks 1 part of 0 to 1: 0"):
        await asyncshard.load(tmp_path)


async def test_no_file_for_the_rank_says_which_ranks_are_there(tmp_path, checkpoints):
    for rank in (0, 2):
        checkpoints.write_ranks(tmp_path, {"w": np.zeros(1)}, rank=rank)
    with pytest.raises(ObjectNotFoundError, match=r"rank 1 .*ranks 0, 2"):
        await ShardedStateLoader(rank=1, world_size=3).load_weights(tmp_path)


async def test_a_rank_outside_the_world_is_an_error(tmp_path, checkpoints):
    for rank in (0, 5):
        checkpoints.write_ranks(tmp_path, {"w": np.zeros(1)}, rank=rank)
    with pytest.raises(CheckpointError, match="rank 5"):
        await ShardedStateLoader(world_size=2).load_weights(tmp_path)


async def test_two_files_of_one_part_are_an_error(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.zeros(1)})
    checkpoints.write_file(tmp_path / "model-rank-0-part-00.safetensors", {"w": np.zeros(1)})
    with pytest.raises(CheckpointError, match="more than one file"):
        await asyncshard.load(tmp_path)


@pytest.mark.parametrize("bad", [{"rank": -1}, {"rank": 1}, {"world_size": 0}, {"pp_rank": -1}, {"rank": 1.5}])
def test_a_rank_outside_its_world_is_a_value_error(bad):
    with pytest.raises(ValueError):
        ShardedStateLoader(**bad)


@pytest.mark.parametrize("as_pattern", [str, ShardPattern])
async def test_an_explicit_pattern_finds_its_files_and_no_others(as_pattern, tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"other": np.zeros(1)})
    for part in (0, 1):
        checkpoints.write_file(tmp_path / f"tp{part}_{0}.st", {f"w{part}": np.full(2, part)})
    loader = ShardedStateLoader(as_pattern("tp{part}_{tp_rank}.st"))
    assert list(await loader.load_weights(tmp_path)) == ["w0", "w1"]


async def test_an_explicit_pattern_takes_no_other_layout(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "model.safetensors", {"w": np.zeros(1)})
    with pytest.raises(ObjectNotFoundError, match=r"x\{rank\}y\{part\}"):
        await ShardedStateLoader("x{rank}y{part}").load_weights(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        await ShardedStateLoader("x{rank}y{part}").load_weights(tmp_path / "model.safetensors")


async def test_pipeline_ranks_are_told_apart(tmp_path, checkpoints):
    for pp_rank in range(2):
        for rank in range(2):
            name = f"model-pp-{pp_rank}-tp-{rank}-part-0.safetensors"
            checkpoints.write_file(tmp_path / name, {"w": np.array([pp_rank, rank])})
    for pp_rank in range(2):
        for rank in range(2):
            got = await ShardedStateLoader(rank=rank, world_size=2, pp_rank=pp_rank).load_weights(tmp_path)
            assert got["w"].tolist() == [pp_rank, rank]
    with pytest.raises(ObjectNotFoundError, match="pp_rank 7 rank 0"):
        await ShardedStateLoader(world_size=2, pp_rank=7).load_weights(tmp_path)


async def test_a_pipeline_rank_where_the_files_have_none_is_an_error(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.zeros(1)})
    with pytest.raises(ObjectNotFoundError, match="pp_rank"):
        await ShardedStateLoader(pp_rank=1).load_weights(tmp_path)


# Paths


@pytest.mark.parametrize("form", [str, lambda path: path, lambda path: f"{path}/", lambda path: path.as_uri()])
async def test_a_path_may_be_a_str_a_path_or_a_file_url(form, tmp_path, checkpoints):
    folder = tmp_path / "with space % é"
    checkpoints.write_ranks(folder, {"w": np.arange(3)})
    assert same(await asyncshard.load(form(folder)), {"w": np.arange(3)})


async def test_a_relative_path_means_the_working_directory_of_the_call(tmp_path, checkpoints, monkeypatch):
    checkpoints.write_ranks(tmp_path / "model", {"w": np.arange(3)})
    monkeypatch.chdir(tmp_path)
    stream = await asyncshard.stream("model")
    monkeypatch.chdir("/")
    assert [name async for name, _ in stream] == ["w"]


@pytest.mark.parametrize("bad", ["", "a\0b", "ftp://host/x", "nosuch://bucket/prefix"])
async def test_a_path_that_names_no_store_is_a_value_error(bad):
    with pytest.raises(ValueError):
        await asyncshard.load(bad)


@pytest.mark.parametrize("bad", [None, 3, b"/tmp"])
async def test_a_path_that_is_no_text_is_a_type_error(bad):
    with pytest.raises(TypeError):
        await asyncshard.load(bad)


async def test_a_directory_given_by_a_symbolic_link_loads(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path / "real", {"w": np.arange(3)})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "again").symlink_to("link")
    assert same(await asyncshard.load(tmp_path / "again"), {"w": np.arange(3)})


async def test_a_file_given_by_a_symbolic_link_loads(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "real", {"w": np.arange(3)})
    (tmp_path / "link.safetensors").symlink_to("real")
    assert same(await asyncshard.load(tmp_path / "link.safetensors"), {"w": np.arange(3)})


async def test_links_inside_the_directory_are_followed(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "blob", {"w": np.arange(3)})
    (tmp_path / "model-rank-0-part-0.safetensors").symlink_to("blob")
    assert same(await asyncshard.load(tmp_path), {"w": np.arange(3)})


async def test_links_that_lead_outside_are_refused_unless_allowed(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "secret", {"w": np.arange(3)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-rank-0-part-0.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(AccessDeniedError, match=r"outside.*allow_symlinks"):
        await asyncshard.load(folder)
    options = {"allow_symlinks": True}
    assert same(await asyncshard.load(folder, storage_options=options), {"w": np.arange(3)})


async def test_a_sibling_whose_name_begins_alike_is_outside(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "model-evil", {"w": np.arange(3)})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to("../model-evil")
    with pytest.raises(AccessDeniedError):
        await asyncshard.load(tmp_path / "model")


@pytest.mark.parametrize("via_link", [False, True])
async def test_the_hugging_face_cache_loads(via_link, tmp_path, checkpoints):
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "0123abcd"
    checkpoints.write_hugging_face(cache / "blobs", {"a": np.arange(3)}, {"b": np.arange(4)})
    snapshot.mkdir(parents=True)
    for number, name in enumerate(sorted(os.listdir(cache / "blobs"))):
        (cache / "blobs" / name).rename(cache / "blobs" / f"hash{number}")
        (snapshot / name).symlink_to(f"../../blobs/hash{number}")
    path = snapshot
    if via_link:
        path = tmp_path / "link"
        path.symlink_to(snapshot)
    assert list(await asyncshard.load(path)) == ["a", "b"]


async def test_the_error_for_an_empty_directory_names_the_files_that_were_expected(tmp_path):
    with pytest.raises(
        ObjectNotFoundError, match=r"model-rank-.*model\.safetensors\.index\.json or model\.safetensors"
    ):
        await asyncshard.load(tmp_path)


async def test_a_path_that_is_not_there_is_a_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        await asyncshard.load(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(FileNotFoundError):
        await asyncshard.load(tmp_path / "none" / "deeper.safetensors")


# Hugging Face directories


async def test_one_model_file_loads(tmp_path, checkpoints, weights):
    checkpoints.write_file(tmp_path / "model.safetensors", weights)
    assert same(await asyncshard.load(tmp_path), weights)


async def test_the_shards_of_an_index_come_in_numeric_order(tmp_path, checkpoints):
    shards = [{f"t{number}": np.array([number])} for number in range(11)]
    checkpoints.write_hugging_face(tmp_path, *shards)
    assert list(await asyncshard.load(tmp_path)) == [f"t{number}" for number in range(11)]


async def test_a_shard_in_a_folder_below_the_index_loads(tmp_path, checkpoints):
    (tmp_path / "sub").mkdir()
    checkpoints.write_file(tmp_path / "sub" / "x.safetensors", {"w": np.arange(2)})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": "sub/x.safetensors"}}))
    assert same(await asyncshard.load(tmp_path), {"w": np.arange(2)})


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "", "a/../../secret", "..\\secret", "./x", "a//b", "C:x", "x\0y", "a/.."]
)
async def test_an_index_that_points_outside_is_refused_before_anything_is_opened(name, tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "secret", {"w": np.arange(2)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(FormatError, match="weight_map maps tensor 'w'") as caught:
        await asyncshard.load(folder)
    assert caught.value.tensor == "w"
    assert str(folder / INDEX) == caught.value.path


async def test_an_index_whose_shard_is_a_link_to_the_outside_is_refused(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "secret", {"w": np.arange(2)})
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x.safetensors").symlink_to("../../secret")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "sub/x.safetensors"}}))
    with pytest.raises(AccessDeniedError):
        await asyncshard.load(folder)


async def test_an_index_that_is_itself_a_link_to_the_outside_is_refused(tmp_path, checkpoints):
    checkpoints.write_hugging_face(tmp_path / "real", {"w": np.arange(2)})
    shutil.copytree(tmp_path / "real", tmp_path / "model")
    (tmp_path / "model" / INDEX).unlink()
    (tmp_path / "model" / INDEX).symlink_to(tmp_path / "real" / INDEX)
    with pytest.raises(AccessDeniedError):
        await asyncshard.load(tmp_path / "model")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": ["x"]}}',
        '{"weight_map": {"w": "x", "w": "y"}}',
        '{"weight_map": {"w": "x"}, "weight_map": {"w": "y"}}',
        '{"weight_map": {"w": "x",}}',
        '{"weight_map": {"w": "\\ud800"}}',
        '{"weight_map": ' * 200,
    ],
)
async def test_a_malformed_index_is_a_format_error_that_names_it(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FormatError) as caught:
        await asyncshard.load(tmp_path)
    assert caught.value.path == str(tmp_path / INDEX)
    assert str(tmp_path / INDEX) in str(caught.value)


async def test_an_index_that_is_not_utf8_is_a_format_error(tmp_path):
    (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": "x"}}')
    with pytest.raises(FormatError):
        await asyncshard.load(tmp_path)


async def test_an_index_above_the_size_limit_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="index"):
        await asyncshard.load(tmp_path)


async def test_an_index_without_tensors_loads_an_empty_dict(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert await asyncshard.load(tmp_path) == {}
    assert await ShardedStateLoader().load_weights(tmp_path, {}) == {}


async def test_a_file_that_the_index_names_and_that_is_missing_is_named(tmp_path, checkpoints):
    checkpoints.write_hugging_face(tmp_path, {"a": np.arange(3)}, {"b": np.arange(3)})
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ObjectNotFoundError, match="model-00002-of-00002"):
        await asyncshard.load(tmp_path)


async def test_a_file_missing_from_a_folder_below_is_named(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {"w": "sub/x.safetensors"}}')
    with pytest.raises(ObjectNotFoundError, match=r"sub/x\.safetensors"):
        await asyncshard.load(tmp_path)


async def test_a_tensor_that_the_index_places_in_a_file_without_it_is_an_error(tmp_path, checkpoints):
    checkpoints.write_hugging_face(tmp_path, {"a": np.arange(3), "b": np.arange(3)})
    checkpoints.write_file(tmp_path / "model-00001-of-00001.safetensors", {"a": np.arange(3)})
    with pytest.raises(NamesError, match="places 'b' in it") as caught:
        await asyncshard.load(tmp_path)
    assert caught.value.missing == ("b",)
    assert caught.value.path.endswith("model-00001-of-00001.safetensors")


async def test_a_tensor_that_the_index_does_not_know_is_an_error(tmp_path, checkpoints):
    checkpoints.write_hugging_face(tmp_path, {"a": np.arange(3)})
    checkpoints.write_file(tmp_path / "model-00001-of-00001.safetensors", {"a": np.arange(3), "stowaway": np.arange(3)})
    with pytest.raises(NamesError, match="stowaway") as caught:
        await asyncshard.load(tmp_path)
    assert caught.value.unexpected == ("stowaway",)


async def test_a_name_in_two_shards_is_an_error_that_names_both(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(3)}, {"w": np.arange(3)})
    with pytest.raises(CheckpointError, match=r"'w' in .*part-0.* and .*part-1"):
        await asyncshard.load(tmp_path)
    with pytest.raises(CheckpointError):
        await ShardedStateLoader().load_weights(tmp_path, {"w": np.zeros(3, np.int64)}, strict=False)


async def test_rank_shards_go_before_an_index_and_an_index_before_one_file(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "model.safetensors", {"single": np.zeros(1)})
    assert list(await asyncshard.load(tmp_path)) == ["single"]
    checkpoints.write_hugging_face(tmp_path, {"index": np.zeros(1)})
    assert list(await asyncshard.load(tmp_path)) == ["index"]
    checkpoints.write_ranks(tmp_path, {"ranks": np.zeros(1)})
    assert list(await asyncshard.load(tmp_path)) == ["ranks"]


# Into a state dict


async def test_a_state_dict_is_filled_in_place_and_returned(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    state = blank(weights)
    addresses = {name: array.ctypes.data for name, array in state.items()}
    assert await ShardedStateLoader().load_weights(tmp_path, state) is state
    assert same(state, weights)
    assert {name: array.ctypes.data for name, array in state.items()} == addresses


async def test_the_order_of_the_state_dict_does_not_matter(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    state = dict(reversed(blank(weights).items()))
    await ShardedStateLoader().load_weights(tmp_path, state)
    assert same(dict(reversed(state.items())), weights)


async def test_tensors_larger_than_a_chunk_are_whole(tmp_path, checkpoints):
    weights = {
        "w": np.random.default_rng(2).integers(0, 256, (101, 33), np.uint8),
        "v": np.arange(77, dtype=np.int16),
    }
    checkpoints.write_ranks(tmp_path, weights)
    for chunk_size in (64, 200, 1000, 1 << 20):
        state = blank(weights)
        await ShardedStateLoader(chunk_size=chunk_size).load_weights(tmp_path, state)
        assert same(state, weights)


async def test_odd_offsets_are_no_matter(tmp_path, checkpoints):
    weights = {
        "byte": np.array([1], np.uint8),
        "w": np.arange(100, dtype=np.float64),
        "v": np.arange(7, dtype=np.int16),
    }
    path = checkpoints.write_file(tmp_path / "odd.safetensors", weights, padding=3)
    state = blank(weights)
    await ShardedStateLoader().load_weights(path, state)
    assert same(state, weights)
    assert same(await asyncshard.load(path), weights)
    async for name, array in asyncshard.stream(path):
        assert array.flags.aligned, name
        assert array.tobytes() == weights[name].tobytes()


def strided(kind, shape):
    """Return a float32 array of a layout, and the whole that it is a view of."""
    rows, columns = shape
    base = np.full((rows * 3 + 2, columns * 3 + 2), -1, np.float32)
    views = {
        "transposed": lambda: np.full((columns, rows), -1, np.float32).T,
        "every second column": lambda: base[:rows, : 2 * columns : 2],
        "backwards": lambda: base[rows - 1 :: -1, columns - 1 :: -1],
        "a block": lambda: base[1 : rows + 1, 1 : columns + 1],
        "fortran": lambda: np.full(shape, -1, np.float32, order="F"),
        "misaligned": lambda: np.full(rows * columns * 4 + 1, 255, np.uint8)[1:].view(np.float32).reshape(shape),
        "a broadcast axis of one": lambda: base[:rows, :columns],
    }
    return views[kind](), base


@pytest.mark.parametrize("kind", ["transposed", "every second column", "backwards", "a block", "fortran", "misaligned"])
@pytest.mark.parametrize("chunk_size", [64, 1000, 1 << 20])
async def test_a_strided_destination_is_filled_and_nothing_around_it(kind, chunk_size, tmp_path, checkpoints):
    weights = {"w": np.random.default_rng(3).standard_normal((37, 21)).astype(np.float32)}
    checkpoints.write_ranks(tmp_path, weights)
    view, base = strided(kind, (37, 21))
    await ShardedStateLoader(chunk_size=chunk_size).load_weights(tmp_path, {"w": view})
    assert (view == weights["w"]).all()
    if np.shares_memory(view, base):
        assert (base != -1).sum() == view.size


async def test_views_of_one_fused_parameter_are_filled(tmp_path, checkpoints):
    weights = {name: np.random.default_rng(4).standard_normal((8, 16)).astype(np.float32) for name in "qkv"}
    checkpoints.write_ranks(tmp_path, weights)
    by_rows, by_columns = np.zeros((24, 16), np.float32), np.zeros((8, 48), np.float32)
    for fused, views in (
        (by_rows, {name: by_rows[8 * i : 8 * i + 8] for i, name in enumerate("qkv")}),
        (by_columns, {name: by_columns[:, 16 * i : 16 * i + 16] for i, name in enumerate("qkv")}),
    ):
        await ShardedStateLoader().load_weights(tmp_path, views)
        axis = 0 if fused is by_rows else 1
        assert (fused == np.concatenate([weights[name] for name in "qkv"], axis)).all()


@pytest.mark.parametrize("side", ["missing", "unexpected", "both"])
async def test_strict_lists_the_names_that_do_not_match_before_a_byte_is_written(side, tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    state = blank(weights)
    if side in ("missing", "both"):
        state["extra.one"] = np.full(1, 99, np.uint8)
    if side in ("unexpected", "both"):
        del state["a.weight"]
    with pytest.raises(NamesError) as caught:
        await ShardedStateLoader().load_weights(tmp_path, state)
    assert caught.value.missing == (("extra.one",) if side != "unexpected" else ())
    assert caught.value.unexpected == (("a.weight",) if side != "missing" else ())
    for name in (*caught.value.missing, *caught.value.unexpected):
        assert repr(name) in str(caught.value)
    assert isinstance(caught.value, KeyError)
    assert untouched(state)


async def test_an_empty_state_dict_is_strict_by_default(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    with pytest.raises(NamesError):
        await ShardedStateLoader().load_weights(tmp_path, {})


async def test_a_name_whose_memory_another_one_fills_is_not_missing(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"embed": np.arange(12, dtype=np.float32).reshape(3, 4)})
    embed = np.zeros((3, 4), np.float32)
    state = {"embed": embed, "head": embed, "first_row": embed[0], "turned": embed.T}
    loader = ShardedStateLoader()
    await loader.load_weights(tmp_path, state)
    assert state["head"][2, 3] == 11
    assert loader.last_report.missing == ()


async def test_a_name_that_is_only_partly_filled_is_missing(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"half": np.arange(6, dtype=np.float32)})
    whole = np.full(12, 99, np.float32)
    with pytest.raises(NamesError, match="whole"):
        await ShardedStateLoader().load_weights(tmp_path, {"half": whole[:6], "whole": whole})
    assert (whole == 99).all()


async def test_a_name_that_a_narrowed_tensor_does_not_reach_is_missing(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(6, dtype=np.float32)})
    memory = np.full(12, 99, np.float32)
    with pytest.raises(NamesError, match="tail"):
        await ShardedStateLoader().load_weights(tmp_path, {"w": memory, "tail": memory[6:]})
    with pytest.raises(NamesError, match="twin"):
        await ShardedStateLoader().load_weights(tmp_path, {"w": memory, "twin": memory})


async def test_an_empty_array_is_never_missing(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(6)})
    await ShardedStateLoader().load_weights(tmp_path, {"w": np.zeros(6, np.int64), "nothing": np.zeros((0, 3))})


async def test_without_strict_each_kind_of_mismatch_is_one_warning(tmp_path, checkpoints, weights, caplog):
    checkpoints.write_ranks(tmp_path, weights)
    state = blank(weights)
    del state["a.weight"], state["c.weight"]
    state["x.one"] = state["x.two"] = np.full(3, 99, np.uint8)
    loader = ShardedStateLoader()
    with caplog.at_level(logging.WARNING):
        await loader.load_weights(tmp_path, state, strict=False)
    messages = warnings_of(caplog)
    assert len(messages) == 2
    assert any("x.one" in message and "x.two" in message and "2 tensors are missing" in message for message in messages)
    assert any("a.weight" in message and "c.weight" in message for message in messages)
    assert all(str(tmp_path) in message for message in messages)
    assert loader.last_report.missing == ("x.one", "x.two")
    assert loader.last_report.unexpected == ("a.weight", "c.weight")
    assert (state["x.one"] == 99).all()
    assert state["a.bias"].tobytes() == weights["a.bias"].tobytes()


async def test_a_load_that_matches_says_nothing(tmp_path, checkpoints, weights, caplog):
    checkpoints.write_ranks(tmp_path, weights)
    with caplog.at_level(logging.DEBUG):
        await ShardedStateLoader().load_weights(tmp_path, blank(weights), strict=False)
    assert warnings_of(caplog) == []


async def test_tensors_without_a_destination_are_not_read(tmp_path, checkpoints):
    weights = {"wanted": np.arange(1000, dtype=np.uint8), "not": np.arange(250, dtype=np.uint8)}
    path = checkpoints.write_file(tmp_path / "model.safetensors", weights)
    stream = asyncshard.AsyncShardLoader().stream(path, into={"wanted": np.zeros(1000, np.uint8)}, strict=False)
    statistics = await stream.drain()
    assert (statistics.bytes_total, statistics.bytes_done) == (1000, 1000)
    assert (statistics.tensors_total, statistics.tensors_done) == (1, 1)
    assert statistics.unexpected == ("not",)


async def test_a_shard_of_which_nobody_wants_anything_costs_only_its_header(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(100)}, {"huge": np.zeros(1 << 20)})
    loader = ShardedStateLoader()
    state = {"w": np.zeros(100, np.int64)}
    before = io_counters()
    await loader.load_weights(tmp_path, state, strict=False)
    assert io_counters() - before < 1 << 20
    assert state["w"][99] == 99


def io_counters():
    """Return the bytes that this process has read."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


async def test_a_smaller_tensor_fills_the_corner_with_a_warning(tmp_path, checkpoints, caplog):
    weights = {
        "w": np.random.default_rng(5).standard_normal((6, 5)).astype(np.float32),
        "b": np.arange(6, dtype=np.float32),
    }
    checkpoints.write_ranks(tmp_path, weights)
    state = {"w": np.full((8, 7), -1, np.float32), "b": np.full(8, -1, np.float32)}
    loader = ShardedStateLoader()
    with caplog.at_level(logging.WARNING):
        await loader.load_weights(tmp_path, state)
    assert (state["w"][:6, :5] == weights["w"]).all()
    assert (state["w"] == -1).sum() == 8 * 7 - 6 * 5
    assert state["b"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert sorted(loader.last_report.narrowed) == ["b", "w"]
    (message,) = warnings_of(caplog)
    assert "w" in message
    assert "b" in message


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (20,), (4, 5, 1), (), (2, 10)])
async def test_a_tensor_that_does_not_fit_is_an_error_before_a_byte_is_written(shape, tmp_path, checkpoints):
    weights = {"first": np.arange(9, dtype=np.float32), "w": np.arange(20, dtype=np.float32).reshape(4, 5)}
    checkpoints.write_ranks(tmp_path, weights)
    state = {"first": np.full(9, -1, np.float32), "w": np.full(shape, -1, np.float32)}
    with pytest.raises(DestinationError, match=r"'w' has shape \[4, 5\]"):
        await ShardedStateLoader().load_weights(tmp_path, state)
    assert all((array == -1).all() for array in state.values())


@pytest.mark.parametrize("kind", [np.float64, np.int32, np.float16, ">f4", "S4", "M8[s]", "V4", object, np.clongdouble])
async def test_another_dtype_is_an_error_before_a_byte_is_written(kind, tmp_path, checkpoints):
    weights = {"first": np.arange(9, dtype=np.float32), "w": np.arange(20, dtype=np.float32)}
    checkpoints.write_ranks(tmp_path, weights)
    state = {"first": np.full(9, -1, np.float32), "w": np.zeros(20, kind)}
    before = state["w"].tolist()
    with pytest.raises(DestinationError, match="'w'"):
        await ShardedStateLoader().load_weights(tmp_path, state)
    assert (state["first"] == -1).all()
    assert state["w"].tolist() == before


async def test_every_problem_is_listed_at_once(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {name: np.zeros(3, np.float32) for name in "abcd"})
    read_only = np.zeros(3, np.float32)
    read_only.flags.writeable = False
    state = {"a": np.zeros(2, np.float32), "b": np.zeros(3, np.int8), "c": read_only, "d": [0.0, 0.0, 0.0]}
    with pytest.raises(DestinationError) as caught:
        await ShardedStateLoader().load_weights(tmp_path, state)
    for text in ("'a' has shape", "'b' has dtype", "'c' is read-only", "'d' is a list"):
        assert text in str(caught.value)


async def test_read_only_memory_is_refused(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(3, dtype=np.uint8)})
    frozen = np.frombuffer(b"abc", np.uint8)
    with pytest.raises(DestinationError, match="read-only"):
        await ShardedStateLoader().load_weights(tmp_path, {"w": frozen})
    assert frozen.tobytes() == b"abc"


async def test_elements_that_share_memory_are_refused(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(12, dtype=np.float32).reshape(3, 4)})
    row = np.zeros(6, np.float32)
    for view in (
        np.lib.stride_tricks.as_strided(row, (3, 4), (0, 4), writeable=True),
        np.lib.stride_tricks.as_strided(row, (3, 4), (4, 4), writeable=True),
        np.lib.stride_tricks.as_strided(row, (3, 4), (8, 2), writeable=True),
    ):
        with pytest.raises(DestinationError, match="share memory"):
            await ShardedStateLoader().load_weights(tmp_path, {"w": view})
    assert not row.any()


async def test_destinations_that_overlap_are_refused(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {name: np.arange(1, 5, dtype=np.float32) for name in ("a", "b", "c")})
    memory = np.zeros(12, np.float32)
    for a, b, c in (
        (memory[:4], memory[3:7], memory[8:]),
        (memory[0:8:2], memory[6:10], memory[8:]),
        (memory[0:8:2], memory[2:10:2], np.zeros(4, np.float32)),
    ):
        with pytest.raises(DestinationError, match="share memory"):
            await ShardedStateLoader().load_weights(tmp_path, {"a": a, "b": b, "c": c})
    assert not memory.any()


async def test_interleaved_destinations_that_do_not_overlap_are_filled(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"a": np.arange(4, dtype=np.float32), "b": np.arange(4, 8, dtype=np.float32)})
    memory = np.zeros(8, np.float32)
    await ShardedStateLoader().load_weights(tmp_path, {"a": memory[::2], "b": memory[1::2]})
    assert memory.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


# cast


@pytest.mark.parametrize(
    "source", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint8, np.bool_, np.float64]
)
@pytest.mark.parametrize("target", [np.float32, ml_dtypes.bfloat16, np.int64, np.float16, ml_dtypes.float8_e4m3fn])
async def test_cast_converts_as_numpy_does(source, target, tmp_path, checkpoints):
    values = np.random.default_rng(6).integers(0, 100, (31, 17)).astype(source)
    checkpoints.write_ranks(tmp_path, {"w": values, "same": np.arange(5)})
    state = {"w": np.zeros((31, 17), target), "same": np.zeros(5, np.int64)}
    await ShardedStateLoader(chunk_size=256).load_weights(tmp_path, state, cast=True)
    assert state["w"].tobytes() == values.astype(target).tobytes()
    assert state["same"].tolist() == list(range(5))


async def test_cast_into_a_strided_narrowed_corner(tmp_path, checkpoints):
    values = np.arange(35, dtype=np.float32).reshape(5, 7)
    checkpoints.write_ranks(tmp_path, {"w": values})
    state = {"w": np.full((9, 6), -1, np.float64).T}
    with pytest.raises(DestinationError):
        await ShardedStateLoader().load_weights(tmp_path, state)
    state = {"w": np.full((9, 6), -1, np.float64).T[::1]}
    assert state["w"].shape == (6, 9)
    await ShardedStateLoader(chunk_size=64).load_weights(tmp_path, state, cast=True)
    assert (state["w"][:5, :7] == values).all()
    assert (state["w"] == -1).sum() == 54 - 35


async def test_cast_goes_through_the_budget(tmp_path, checkpoints):
    values = np.random.default_rng(7).standard_normal(1 << 20).astype(np.float32)  # 4 MiB
    checkpoints.write_ranks(tmp_path, {"w": values})
    loader = ShardedStateLoader(memory_budget_mb=1)
    state = {"w": np.zeros(1 << 20, np.float64)}
    await loader.load_weights(tmp_path, state, cast=True)
    assert (state["w"] == values).all()
    assert loader.budget.bytes_used == 0


async def test_cast_that_cannot_be_is_an_error_before_a_byte_is_written(tmp_path, checkpoints):
    raw = checkpoints.Raw
    checkpoints.write_ranks(
        tmp_path, {"first": np.ones(3), "w": np.ones(4, np.complex64), "p": raw("F4", (4,), b"\x12\x34")}
    )
    state = {"first": np.zeros(3), "w": np.zeros(4), "p": np.zeros(4, np.float32)}
    with pytest.raises(DestinationError, match=r"(?s)'w'.*'p'"):
        await ShardedStateLoader().load_weights(tmp_path, state, cast=True)
    assert not any(array.any() for array in state.values())


async def test_cast_to_a_smaller_type_overflows_without_a_warning(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.array([1e30, 1.0], np.float32)})
    state = {"w": np.zeros(2, np.float16)}
    await ShardedStateLoader().load_weights(tmp_path, state, cast=True)
    assert state["w"].tolist() == [np.inf, 1.0]


# Without a state dict, and afterwards


async def test_without_a_state_dict_new_arrays_belong_to_the_caller(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    loader = ShardedStateLoader()
    one, two = await loader.load_weights(tmp_path), await loader.load_weights(tmp_path)
    assert same(one, weights)
    assert same(two, weights)
    for name, array in one.items():
        assert array.flags.writeable
        assert array.flags.aligned
        assert array.size == 0 or not np.shares_memory(array, two[name])
        array.reshape(-1).view(np.uint8)[...] = 0
    assert same(two, weights)
    assert loader.budget.bytes_used == loader.budget.bytes_held == 0


async def test_new_arrays_may_exceed_the_budget(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.arange(1 << 18, dtype=np.float64)})
    got = await asyncshard.load(tmp_path, memory_budget_mb=1)
    assert got["w"][-1] == (1 << 18) - 1


async def test_one_new_array_outlives_the_others(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {f"t{i}": np.full(5000, i) for i in range(20)})
    kept = (await asyncshard.load(tmp_path))["t7"][100:200]
    await asyncshard.load(tmp_path)
    assert (kept == 7).all()


async def test_all_22_dtypes_load_as_their_bytes(tmp_path, checkpoints):
    tensors = checkpoints.every_dtype()
    checkpoints.write_ranks(tmp_path, tensors)
    got = await asyncshard.load(tmp_path)
    assert checkpoints.same(got, tensors)
    assert got["BF16"].dtype == ml_dtypes.bfloat16
    assert got["F8_E4M3"].dtype == ml_dtypes.float8_e4m3fn
    assert got["F4"].dtype == got["F6_E2M3"].dtype == np.uint8
    state = {name: np.zeros_like(array) for name, array in got.items()}
    await ShardedStateLoader().load_weights(tmp_path, state)
    assert checkpoints.same(state, tensors)


async def test_the_report_tells_of_the_load_that_ended_last(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    loader = ShardedStateLoader()
    assert loader.last_report is None
    await loader.load_weights(tmp_path, {"x": np.zeros(1)}, strict=False)
    assert loader.last_report.missing == ("x",)
    assert set(loader.last_report.unexpected) == set(weights)
    await loader.load_weights(tmp_path, blank(weights))
    assert loader.last_report == type(loader.last_report)((), (), ())


async def test_the_facts_of_a_tensor_are_on_the_stream(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    async with ShardedStateLoader().iterate_weights(tmp_path) as stream:
        assert list(stream.info) == list(weights)
        assert len(stream.info) == len(weights)
        assert stream.info["a.weight"].shape == (64, 48)
        assert stream.info["c.bf16"].dtype == "BF16"
        assert "nothing" not in stream.info
        with pytest.raises(KeyError):
            stream.info["nothing"]


async def test_a_zero_tensor_file_loads(tmp_path, checkpoints):
    for number, metadata in enumerate((None, {"format": "pt"})):
        path = checkpoints.write_file(tmp_path / f"{number}.safetensors", {}, metadata=metadata)
        assert await asyncshard.load(path) == {}
        assert await ShardedStateLoader().load_weights(path, {}) == {}
        assert [item async for item in asyncshard.stream(path)] == []


async def test_read_header_reads_one_file_and_no_directory(tmp_path, checkpoints, weights):
    checkpoints.write_ranks(tmp_path, weights)
    with pytest.raises(NotRegularFileError):
        await asyncshard.read_header(tmp_path)
    header = await asyncshard.read_header(tmp_path / "model-rank-0-part-0.safetensors")
    assert list(header) == list(weights)
    path = checkpoints.write_file(tmp_path / "x", weights, metadata={"a": "b"})
    assert (await asyncshard.read_header(path)).metadata == {"a": "b"}
    with pytest.raises(FormatError, match="max_header_bytes"):
        await asyncshard.read_header(path, max_header_bytes=10)
    with pytest.raises(FormatError):
        await asyncshard.read_header(path, max_tensors=2)


async def test_a_budget_too_small_for_the_header_is_an_error_at_await(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {f"a.rather.long.name.{i}": np.zeros(0) for i in range(2000)})
    with pytest.raises(BudgetError, match="headers"):
        await asyncshard.stream(tmp_path, memory_budget_mb=0.01)
