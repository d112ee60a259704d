"""Writing a sharded state: what is written comes back, and a save that fails leaves what was there."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from safetensors.numpy import load_file

import asyncshard
from asyncshard import ShardedStateLoader, ShardPattern, save_sharded_state
from asyncshard.errors import StoreError
from asyncshard.format.digests import DIGESTS_KEY, digests_of
from asyncshard.format.save_id import SAVE_KEY

NUMPY_DTYPES = [
    *(
        np.dtype(name)
        for name in ("?", "u1", "i1", "<u2", "<i2", "<f2", "<u4", "<i4", "<f4", "<u8", "<i8", "<f8", "<c8")
    ),
    *(
        np.dtype(kind)
        for kind in (
            ml_dtypes.bfloat16,
            ml_dtypes.float8_e5m2,
            ml_dtypes.float8_e4m3fn,
            ml_dtypes.float8_e8m0fnu,
            ml_dtypes.float8_e4m3fnuz,
            ml_dtypes.float8_e5m2fnuz,
        )
    ),
]
TORCH_DTYPES = (
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "float16",
    "bfloat16",
    "uint32",
    "int32",
    "float32",
    "uint64",
    "int64",
    "float64",
    "complex64",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e8m0fnu",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float4_e2m1fn_x2",
)


def names_in(directory):
    return sorted(os.listdir(directory))


async def test_what_numpy_wrote_comes_back_with_every_dtype(tmp_path):
    rng = np.random.default_rng(1)
    state = {
        str(dtype): rng.integers(0, 2, (3, 5 * dtype.itemsize), np.uint8).view(dtype).reshape(5, 3)
        for dtype in NUMPY_DTYPES
    }
    state["scalar"] = np.array(3.5)
    assert await save_sharded_state(state, tmp_path, rank=0) == [str(tmp_path / "model-rank-0-part-0.safetensors")]
    got = await asyncshard.load(tmp_path)
    assert set(got) == set(state)
    for name, array in state.items():
        assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape), name
        assert got[name].tobytes() == array.tobytes(), name


async def test_what_torch_wrote_comes_back_with_every_dtype(tmp_path):
    torch = pytest.importorskip("torch")
    state = {
        name: torch.arange(48, dtype=torch.uint8).remainder(2).view(getattr(torch, name)).reshape(2, -1)
        for name in TORCH_DTYPES
    }
    state["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    state["parameter"] = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    await save_sharded_state(state, tmp_path, rank=0)
    got = await asyncshard.load(tmp_path, framework="pt")
    assert set(got) == set(state)
    for name, tensor in state.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        ours, theirs = (item.detach().contiguous().reshape(-1).view(torch.uint8) for item in (got[name], tensor))
        assert torch.equal(ours, theirs), name


async def test_safetensors_reads_what_was_written(tmp_path):
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3, dtype=np.int64)}
    (path,) = await save_sharded_state(state, tmp_path, rank=0, metadata={"format": "np", "né": "ö"})
    got = load_file(path)
    assert {name: array.tolist() for name, array in got.items()} == {n: a.tolist() for n, a in state.items()}
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "np", "né": "ö", SAVE_KEY: ANY}


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base.T,
        lambda base: base[::2, 1::3],
        lambda base: base[::-1, ::-1],
        lambda base: np.broadcast_to(base[0], (4, 12)),
        np.asfortranarray,
        lambda base: base.astype(">f8"),
        lambda base: base.view(np.uint8).reshape(-1)[4:-4].view(np.float64),
        lambda base: base.view(type("Sub", (np.ndarray,), {})),
    ],
)
async def test_strided_and_foreign_arrays_are_written_by_value(view, tmp_path):
    array = view(np.arange(96, dtype=np.float64).reshape(8, 12))
    before = array.tobytes()
    await save_sharded_state({"w": array}, tmp_path, rank=0)
    got = (await asyncshard.load(tmp_path))["w"]
    assert got.shape == array.shape
    assert (got == np.asarray(array)).all()
    assert array.tobytes() == before


async def test_read_only_arrays_may_be_written(tmp_path):
    frozen = np.frombuffer(b"abcdefgh", np.int64)
    await save_sharded_state({"w": frozen}, tmp_path, rank=0)
    assert (await asyncshard.load(tmp_path))["w"].tobytes() == b"abcdefgh"


async def test_what_another_tensor_holds_is_not_written(tmp_path):
    fused = np.arange(30, dtype=np.float32).reshape(10, 3)
    state = {
        "v": fused[5:],
        "qkv": fused,
        "tied": fused,
        "q": fused[:5],
        "empty": np.zeros((0, 3)),
        "other": np.ones(2),
    }
    await save_sharded_state(state, tmp_path, rank=0)
    weights = await asyncshard.load(tmp_path)
    assert set(weights) == {"qkv", "tied", "other"}
    assert weights["tied"] is weights["qkv"]
    memory = np.zeros((10, 3), np.float32)
    back = {
        "v": memory[5:],
        "qkv": memory,
        "tied": memory,
        "q": memory[:5],
        "empty": np.zeros((0, 3)),
        "other": np.ones(2),
    }
    await ShardedStateLoader().load_weights(tmp_path, back)
    assert (back["v"] == fused[5:]).all()


@pytest.mark.parametrize("size", [1, 399, 400, 800, 801, 1200, 10**9])
async def test_parts_hold_at_most_their_size(size, tmp_path):
    state = {f"t{i:02}": np.full(100, i, np.float32) for i in range(12)}
    paths = await save_sharded_state(state, tmp_path, rank=3, max_shard_size=size)
    assert paths == [str(tmp_path / f"model-rank-3-part-{part}.safetensors") for part in range(len(paths))]
    per_part = max(size // 400, 1)
    assert len(paths) == -(-12 // per_part)
    for path in paths:
        assert sum(array.nbytes for array in load_file(path).values()) <= max(size, 400)
    got = await ShardedStateLoader(rank=3, world_size=4).load_weights(tmp_path)
    assert {name: array[0] for name, array in got.items()} == {f"t{i:02}": i for i in range(12)}


async def test_an_empty_state_dict_writes_one_part_without_tensors(tmp_path):
    (path,) = await save_sharded_state({}, tmp_path, rank=0)
    assert await asyncshard.load(tmp_path) == {}
    assert load_file(path) == {}


async def test_the_directory_is_made(tmp_path):
    await save_sharded_state({"w": np.ones(1)}, tmp_path / "a" / "b", rank=0)
    assert list(await asyncshard.load(str(tmp_path / "a" / "b"))) == ["w"]


@pytest.mark.parametrize("as_pattern", [str, ShardPattern])
async def test_a_pattern_names_the_files(as_pattern, tmp_path):
    pattern = as_pattern("pp{pp_rank}.{tp_rank}.{part}")
    await save_sharded_state({"w": np.ones(1)}, tmp_path, rank=2, pp_rank=1, pattern=pattern)
    assert names_in(tmp_path) == ["pp1.2.0"]
    loader = ShardedStateLoader(pattern, rank=2, world_size=3, pp_rank=1)
    assert list(await loader.load_weights(tmp_path)) == ["w"]


async def test_parts_of_an_earlier_save_are_removed_and_nothing_else(tmp_path):
    state = {f"t{i}": np.full(10, i) for i in range(5)}
    for rank in (0, 1):
        await save_sharded_state(state, tmp_path, rank=rank, max_shard_size=1)
    keep = [
        "model.safetensors",
        "model-rank-0-part-7.safetensors.bak",
        "config.json",
        "xmodel-rank-0-part-1.safetensors",
    ]
    for name in keep:
        (tmp_path / name).write_text("keep")
    await save_sharded_state({"new": np.ones(2)}, tmp_path, rank=0, max_shard_size=1)
    assert set(names_in(tmp_path)) == {
        *keep,
        "model-rank-0-part-0.safetensors",
        *(f"model-rank-1-part-{part}.safetensors" for part in range(5)),
    }
    assert list(await ShardedStateLoader(world_size=2).load_weights(tmp_path)) == ["new"]
    assert len(await ShardedStateLoader(rank=1, world_size=2).load_weights(tmp_path)) == 5


async def test_ranks_save_at_once(tmp_path):
    states = [{"w": np.full(1000, rank), "v": np.full(10, rank)} for rank in range(8)]
    await asyncio.gather(
        *(save_sharded_state(state, tmp_path, rank=rank, max_shard_size=8000) for rank, state in enumerate(states))
    )
    assert len(names_in(tmp_path)) == 16
    for rank in range(8):
        got = await ShardedStateLoader(rank=rank, world_size=8).load_weights(tmp_path)
        assert (got["w"] == rank).all()


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"rank": -1}, ValueError),
        ({"rank": 10**18}, ValueError),
        ({"rank": "x"}, ValueError),
        ({"max_shard_size": 0}, ValueError),
        ({"max_shard_size": -5}, ValueError),
        ({"max_shard_size": 1.5}, TypeError),
        ({"max_shard_size": True}, TypeError),
        ({"max_shard_size": "1GB"}, TypeError),
        ({"pattern": "model-{rank}"}, ValueError),
        ({"pp_rank": 1}, ValueError),
        ({"metadata": {"a": 1}}, TypeError),
    ],
)
async def test_a_bad_argument_is_an_error_and_writes_nothing(given, kind, tmp_path):
    with pytest.raises(kind):
        await save_sharded_state({"w": np.ones(1)}, tmp_path, **{"rank": 0, **given})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "value",
    [
        np.ones(2, np.longdouble),
        np.ones(2, np.complex128),
        np.array(["a"]),
        np.array([None]),
        np.zeros(2, "M8[s]"),
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, ml_dtypes.float4_e2m1fn),
        np.zeros(2, ml_dtypes.int4),
    ],
    ids=lambda value: str(value.dtype),
)
async def test_a_dtype_that_the_format_lacks_is_an_error_and_leaves_the_old_files(value, tmp_path):
    await save_sharded_state({"old": np.ones(1)}, tmp_path, rank=0)
    with pytest.raises(ValueError, match="'bad'"):
        await save_sharded_state({"good": np.ones(100), "bad": value}, tmp_path, rank=0, max_shard_size=1)
    assert list(await asyncshard.load(tmp_path)) == ["old"]
    assert names_in(tmp_path) == ["model-rank-0-part-0.safetensors"]


@pytest.mark.parametrize("kind", ["meta", "sparse", "complex128", "lazy conjugate", "packed scalar"])
async def test_a_torch_tensor_that_cannot_be_written_is_named(kind, tmp_path):
    torch = pytest.importorskip("torch")
    bad = {
        "meta": lambda: torch.zeros(3, device="meta"),
        "sparse": lambda: torch.ones(3, 3).to_sparse(),
        "complex128": lambda: torch.zeros(2, dtype=torch.complex128),
        "lazy conjugate": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
        "packed scalar": lambda: torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    }[kind]()
    with pytest.raises(ValueError, match="tensor 'bad' cannot be written"):
        await save_sharded_state({"bad": bad}, tmp_path, rank=0)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("value", [[1.0], 3, None, "text"])
async def test_what_is_no_tensor_is_a_type_error_that_names_it(value, tmp_path):
    with pytest.raises(TypeError, match="'bad'"):
        await save_sharded_state({"bad": value}, tmp_path, rank=0)


async def test_a_name_that_is_no_text_is_a_type_error(tmp_path):
    with pytest.raises(TypeError):
        await save_sharded_state({3: np.ones(1)}, tmp_path, rank=0)


async def test_the_name_that_the_format_keeps_for_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="__metadata__"):
        await save_sharded_state({"__metadata__": np.ones(1)}, tmp_path, rank=0)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/b", "../x", "né", "\0", '"\\', "x" * 10000])
async def test_any_other_text_is_a_name(name, tmp_path):
    await save_sharded_state({name: np.arange(3)}, tmp_path, rank=0)
    got = await asyncshard.load(tmp_path)
    assert list(got) == [name]
    assert names_in(tmp_path) == ["model-rank-0-part-0.safetensors"]


async def test_a_directory_that_is_a_file_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StoreError, match="file"):
            await save_sharded_state({"w": np.ones(1)}, path, rank=0)


async def test_a_save_that_cannot_take_its_name_leaves_no_temporary_file(tmp_path):
    (tmp_path / "model-rank-0-part-0.safetensors").mkdir()
    with pytest.raises(StoreError):
        await save_sharded_state({"w": np.ones(1)}, tmp_path, rank=0)
    assert names_in(tmp_path) == ["model-rank-0-part-0.safetensors"]


FULL_DISK = """
import asyncio, os, pickle, resource, signal, sys
import numpy as np
import asyncshard
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = sys.argv[1]
async def main():
    await asyncshard.save_sharded_state({"old": np.zeros(100)}, directory, rank=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    state = {"a": np.zeros(100), "b": np.zeros(1 << 16), "c": np.zeros(100)}
    try:
        await asyncshard.save_sharded_state(state, directory, rank=0, max_shard_size=1)
    except asyncshard.errors.StoreError as error:
        assert type(error) is asyncshard.errors.StoreError
        assert "part-1" in str(error) and "File too large" in str(error), error
        assert error.errno == 27, error.errno
    else:
        raise AssertionError("it did not fail")
    assert os.listdir(directory) == ["model-rank-0-part-0.safetensors"]
    assert list(await asyncshard.load(directory)) == ["old"]
asyncio.run(main())
"""


def test_a_disk_that_is_full_is_a_store_error_and_leaves_the_old_files(tmp_path):
    child = [sys.executable, "-W", "error", "-c", FULL_DISK, str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])}
    done = subprocess.run(child, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr


async def begun(directory):
    """Wait until a save has begun to write."""
    while not any(name.endswith(".tmp") for name in os.listdir(directory)):  # noqa: ASYNC110
        await asyncio.sleep(0)


@pytest.mark.parametrize("times", [1, 2])
async def test_a_cancelled_save_leaves_the_old_files_and_no_temporary_one(times, tmp_path):
    await save_sharded_state({"old": np.ones(1)}, tmp_path, rank=0)
    state = {f"t{i}": np.full(1000, i) for i in range(300)}
    task = asyncio.create_task(save_sharded_state(state, tmp_path, rank=0, max_shard_size=1))
    await begun(tmp_path)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert names_in(tmp_path) == ["model-rank-0-part-0.safetensors"]
    assert list(await asyncshard.load(tmp_path)) == ["old"]


async def test_saving_leaves_the_event_loop_free(tmp_path):
    state = {f"t{i}": np.zeros(1 << 16) for i in range(20)}
    task = asyncio.create_task(save_sharded_state(state, tmp_path, rank=0, max_shard_size=1))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20


# Digests


async def test_digests_stand_in_the_order_of_the_header_of_each_part(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "b": rng.random(7, np.float32),
        "a": rng.integers(0, 256, 5, np.uint8),
        "z": np.array(3, np.int64),
        "strided": rng.random((6, 4)).T,
        "large": rng.integers(0, 256, (3 << 20) + 1, np.uint8),
        'asyncshard.xxh3_128":"0': rng.integers(0, 256, 9, np.uint8),
    }
    files = await save_sharded_state(
        state, tmp_path, rank=0, digests=True, max_shard_size=64, metadata={"x": f'"{DIGESTS_KEY}":"00"'}
    )
    assert len(files) > 1
    seen = set()
    for path in files:
        header = asyncshard.parse_header(Path(path).read_bytes())
        assert header.metadata["x"] == f'"{DIGESTS_KEY}":"00"'
        for name, row in zip(header, digests_of(header), strict=True):
            assert row.tobytes() == xxhash.xxh3_128(np.ascontiguousarray(state[name]).tobytes()).digest(), name
            seen.add(name)
    assert seen == set(state)
    got = await asyncshard.load(tmp_path)
    assert {name: array.tobytes() for name, array in got.items()} == {
        name: np.ascontiguousarray(array).tobytes() for name, array in state.items()
    }


async def test_digests_of_torch_tensors_are_those_of_their_bytes(tmp_path):
    torch = pytest.importorskip("torch")
    (path,) = await save_sharded_state({"w": torch.ones(5, dtype=torch.bfloat16)}, tmp_path, rank=0, digests=True)
    header = asyncshard.parse_header(Path(path).read_bytes())
    assert digests_of(header)[0].tobytes() == xxhash.xxh3_128(b"\x80\x3f" * 5).digest()


async def test_files_without_digests_have_the_id_of_their_save_alone(tmp_path):
    (path,) = await save_sharded_state({"w": np.zeros(3)}, tmp_path, rank=0)
    assert asyncshard.parse_header(Path(path).read_bytes()).metadata == {SAVE_KEY: ANY}


async def test_a_state_without_tensors_may_have_digests(tmp_path):
    (path,) = await save_sharded_state({}, tmp_path, rank=0, digests=True)
    assert digests_of(asyncshard.parse_header(Path(path).read_bytes())).shape == (0, 16)


async def test_the_key_of_the_digests_cannot_be_given(tmp_path):
    with pytest.raises(ValueError, match=DIGESTS_KEY):
        await save_sharded_state({"w": np.zeros(3)}, tmp_path, rank=0, digests=True, metadata={DIGESTS_KEY: ""})
    assert names_in(tmp_path) == []


async def test_digests_need_a_package_and_say_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ImportError, match=r"asyncshard\[cache\]"):
        await save_sharded_state({"w": np.zeros(3)}, tmp_path / "new", rank=0, digests=True)
    assert names_in(tmp_path) == []
    await save_sharded_state({"w": np.zeros(3)}, tmp_path, rank=0)
