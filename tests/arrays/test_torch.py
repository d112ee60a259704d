"""``framework="pt"`` and torch destinations."""

import gc
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file  # noqa: E402

import asyncshard  # noqa: E402
from asyncshard import AsyncShardLoader, ShardedStateLoader  # noqa: E402
from asyncshard.arrays.torch import DTYPES  # noqa: E402
from asyncshard.errors import DestinationError, NamesError  # noqa: E402


def raw(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), name
    return True


def random(dtype, shape=(6, 8)):
    size = torch.empty((), dtype=dtype).element_size()
    octets = torch.randint(0, 2 if dtype is torch.bool else 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)
    return octets.view(dtype)


@pytest.mark.parametrize("name", sorted(DTYPES))
async def test_every_dtype_is_what_safetensors_gives(name, tmp_path):
    weights = {"w": random(DTYPES[name])}
    save_file(weights, tmp_path / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    assert same(await asyncshard.load(tmp_path, framework="pt"), theirs)
    assert same({n: t async for n, t in asyncshard.stream(tmp_path, framework="pt")}, theirs)
    state = {"w": torch.zeros_like(weights["w"].view(torch.uint8)).view(DTYPES[name])}
    await ShardedStateLoader().load_weights(tmp_path, state)
    assert same(state, theirs)


async def test_a_tensor_is_raw_bytes_only_if_torch_lacks_its_element_type(tmp_path, checkpoints):
    tensors = checkpoints.every_dtype()
    checkpoints.write_ranks(tmp_path, tensors)
    got = await asyncshard.load(tmp_path, framework="pt")
    assert {name for name, tensor in got.items() if tensor.dtype is torch.uint8} == {"U8", "F6_E2M3", "F6_E3M2"}
    assert got["F4"].shape == (12,)
    assert checkpoints.same(got, tensors)


async def test_an_f4_tensor_with_an_odd_last_dimension_is_raw_bytes(tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": checkpoints.Raw("F4", (2, 3), b"\x01\x02\x03")})
    got = (await asyncshard.load(tmp_path, framework="pt"))["w"]
    assert got.dtype is torch.uint8
    assert got.tolist() == [1, 2, 3]
    async with asyncshard.stream(tmp_path, framework="pt") as stream:
        assert stream.info["w"].shape == (2, 3)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (2, 3, 4, 5)])
async def test_scalars_empty_tensors_and_many_dimensions(shape, tmp_path):
    weights = {"w": torch.rand(shape).to(torch.bfloat16), "odd": torch.ones(3, dtype=torch.uint8)}
    save_file(weights, tmp_path / "model.safetensors")
    assert same(await asyncshard.load(tmp_path, framework="pt"), weights)
    assert same({n: t async for n, t in asyncshard.stream(tmp_path, framework="pt")}, weights)
    state = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    await ShardedStateLoader(framework="pt").load_weights(tmp_path, state)
    assert same(state, weights)


async def test_tensors_at_odd_offsets_are_aligned(tmp_path, checkpoints):
    weights = {
        "a": np.ones(1, np.uint8),
        "w": np.arange(9.0),
        "b": np.ones(3, np.uint8),
        "v": np.arange(4, dtype="<f4"),
    }
    path = checkpoints.write_file(tmp_path / "x", weights, padding=1)
    async for name, tensor in asyncshard.stream(path, framework="pt"):
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert tensor.tolist() == weights[name].tolist()


# Destinations


@pytest.mark.parametrize("framework", ["np", "pt"])
async def test_parameters_that_require_grad_are_filled_in_place(framework, tmp_path):
    weights = {"w": torch.rand(5, 6), "b": torch.tensor(3.0, dtype=torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    state = {"w": torch.nn.Parameter(torch.zeros(5, 6)), "b": torch.nn.Parameter(torch.zeros((), dtype=torch.bfloat16))}
    addresses = {name: tensor.data_ptr() for name, tensor in state.items()}
    assert await ShardedStateLoader(framework=framework).load_weights(tmp_path, state) is state
    assert same(state, weights)
    assert {name: tensor.data_ptr() for name, tensor in state.items()} == addresses
    assert all(tensor.requires_grad and tensor.grad is None and tensor.is_leaf for tensor in state.values())


LAYOUTS = {
    "columns of a fused parameter": lambda base: base[:, 6:12],
    "rows of a fused parameter": lambda base: base.reshape(30, 6)[5:15],
    "transposed": lambda base: base[:6, :10].T,
    "every second": lambda base: base[:, ::3],
    "a new axis": lambda base: base[:, None, :6].squeeze(1),
    "channels last": lambda base: torch.zeros(10, 6).t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
async def test_a_view_is_filled_and_nothing_around_it(layout, dtype, tmp_path):
    weights = {"w": random(dtype, (10, 6))}
    save_file(weights, tmp_path / "model.safetensors")
    base = torch.zeros((10, 18), dtype=torch.uint8).to(dtype)
    view = LAYOUTS[layout](base) if layout != "channels last" else LAYOUTS[layout](base).to(dtype)
    assert view.shape == (10, 6)
    before = raw(base)
    await ShardedStateLoader(chunk_size=64).load_weights(tmp_path, {"w": view})
    assert raw(view) == raw(weights["w"])
    LAYOUTS[layout](base).copy_(torch.zeros(10, 6).to(dtype))
    assert raw(base) == before


async def test_the_corner_of_a_larger_parameter_is_filled(tmp_path, caplog):
    weights = {"w": torch.rand(3, 4).to(torch.bfloat16)}
    save_file(weights, tmp_path / "model.safetensors")
    state = {"w": torch.full((5, 6), -1.0, dtype=torch.bfloat16)}
    await ShardedStateLoader().load_weights(tmp_path, state)
    assert torch.equal(state["w"][:3, :4], weights["w"])
    assert int((state["w"] == -1).sum()) == 30 - 12
    assert len(caplog.records) == 1


def lazy_negative():
    return torch.view_as_complex(torch.zeros(3, 2)).conj().imag


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.zeros(3, device="meta"), "meta"),
        (lambda: torch.zeros(3).to_sparse(), "sparse"),
        (lambda: torch.zeros(1).expand(3), "share memory"),
        (lambda: torch.as_strided(torch.zeros(4), (3,), (0,)), "share memory"),
        (lambda: torch.zeros(2), "shape"),
        (lambda: torch.zeros(3, 1), "shape"),
        (lambda: torch.zeros(3, dtype=torch.bfloat16), "dtype"),
        (lambda: torch.zeros(3, dtype=torch.int32), "dtype"),
        (lambda: torch.zeros(3, dtype=torch.complex128), "dtype"),
        (lazy_negative, "resolve it"),
    ],
)
async def test_a_tensor_that_cannot_be_filled_is_refused_before_a_byte_is_written(make, text, tmp_path):
    save_file({"a": torch.ones(3), "w": torch.ones(3)}, tmp_path / "model.safetensors")
    state = {"a": torch.zeros(3), "w": make()}
    with pytest.raises(DestinationError, match=text) as caught:
        await ShardedStateLoader().load_weights(tmp_path, state)
    assert "'w'" in str(caught.value)
    assert not state["a"].any()


async def test_overlapping_windows_are_refused(tmp_path):
    save_file({"w": torch.ones(3, 2)}, tmp_path / "model.safetensors")
    base = torch.zeros(5)
    with pytest.raises(DestinationError, match="share memory"):
        await ShardedStateLoader().load_weights(tmp_path, {"w": base.as_strided((3, 2), (1, 1))})
    assert not base.any()


async def test_two_names_for_overlapping_memory_are_refused(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "model.safetensors")
    base = torch.zeros(6)
    with pytest.raises(DestinationError, match="'a' and 'b' share memory"):
        await ShardedStateLoader().load_weights(tmp_path, {"a": base[:4], "b": base[2:]})
    assert not base.any()


async def test_cast_into_parameters(tmp_path):
    weights = {"w": torch.rand(7, 9), "n": torch.arange(5)}
    save_file(weights, tmp_path / "model.safetensors")
    state = {"w": torch.nn.Parameter(torch.zeros(7, 9, dtype=torch.bfloat16)), "n": torch.zeros(5)}
    await ShardedStateLoader(chunk_size=64).load_weights(tmp_path, state, cast=True)
    assert torch.equal(state["w"], weights["w"].to(torch.bfloat16))
    assert torch.equal(state["n"], weights["n"].float())


# Modules


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.norm = torch.nn.BatchNorm1d(16)
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        self.head = torch.nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.layers(self.norm(self.embed(tokens))))


@pytest.mark.parametrize("max_shard_size", [None, 2000])
async def test_a_module_with_tied_parameters_gives_the_same_outputs(max_shard_size, tmp_path):
    source, target = Model().eval(), Model().eval()
    tokens = torch.arange(50)
    with torch.no_grad():
        assert not torch.equal(source(tokens), target(tokens))
        await asyncshard.save_sharded_state(source.state_dict(), tmp_path, rank=0, max_shard_size=max_shard_size)
        state = target.state_dict()
        assert await ShardedStateLoader().load_weights(tmp_path, state) is state
        assert torch.equal(source(tokens), target(tokens))
    assert target.head.weight is target.embed.weight


async def test_a_streamed_module_gives_the_same_outputs(tmp_path):
    source, target = Model().eval(), Model().eval()
    await asyncshard.save_sharded_state(source.state_dict(), tmp_path, rank=0)
    async with asyncshard.stream(tmp_path, framework="pt", memory_budget_mb=1) as weights:
        target.load_state_dict({name: tensor async for name, tensor in weights}, strict=False)
    with torch.no_grad():
        assert torch.equal(source(torch.arange(50)), target(torch.arange(50)))


async def test_gradients_flow_after_a_load(tmp_path):
    source, target = Model(), Model()
    await asyncshard.save_sharded_state(source.state_dict(), tmp_path, rank=0)
    await ShardedStateLoader().load_weights(tmp_path, target.state_dict())
    target(torch.arange(50)).sum().backward()
    assert all(parameter.grad is not None for parameter in target.parameters())


async def test_parameters_that_the_checkpoint_lacks_are_named(tmp_path):
    await asyncshard.save_sharded_state(Model().state_dict(), tmp_path, rank=0)
    with pytest.raises(NamesError) as caught:
        await ShardedStateLoader().load_weights(tmp_path, torch.nn.Linear(3, 3).state_dict())
    assert set(caught.value.missing) == {"weight", "bias"}


async def test_a_module_on_the_meta_device_is_refused(tmp_path):
    await asyncshard.save_sharded_state(torch.nn.Linear(4, 4).state_dict(), tmp_path, rank=0)
    with torch.device("meta"):
        module = torch.nn.Linear(4, 4)
    with pytest.raises(DestinationError, match="meta"):
        await ShardedStateLoader().load_weights(tmp_path, module.state_dict())


# Leases

KEEPS = {
    "a slice": lambda tensor: tensor[1:],
    "detach": lambda tensor: tensor.detach(),
    "a parameter": lambda tensor: torch.nn.Parameter(tensor),
    "numpy": lambda tensor: tensor.numpy(),
    "a numpy slice": lambda tensor: tensor.numpy()[3:4],
    "a view of another type": lambda tensor: tensor.view(torch.int32),
    "the storage": lambda tensor: tensor.untyped_storage(),
    "a memoryview": lambda tensor: memoryview(tensor.numpy()),
    "an element of unbind": lambda tensor: tensor.reshape(2, -1).unbind(0)[1],
}


@pytest.mark.parametrize("keep", KEEPS)
async def test_the_memory_lives_as_long_as_any_view_of_it(keep, tmp_path):
    size = 1 << 16
    save_file({f"t{i:02}": torch.full((size,), float(i)) for i in range(12)}, tmp_path / "model.safetensors")
    loader = AsyncShardLoader(framework="pt", memory_budget_mb=1, chunk_size=size * 4)
    kept = [KEEPS[keep](tensor) async for _, tensor in loader.stream(tmp_path)]
    assert loader.budget.bytes_held >= 12 * size * 4
    for i, view in enumerate(kept):
        octets = np.frombuffer(octets_of(view), np.float32)
        assert (octets == i).all()
    del view, octets
    half = kept[:6]
    kept.clear()
    gc.collect()
    assert 6 * size * 4 <= loader.budget.bytes_held < 7 * size * 4 + (1 << 13)
    half.clear()
    gc.collect()
    assert loader.budget.bytes_held == 0


def octets_of(view):
    if isinstance(view, torch.UntypedStorage):
        view = torch.empty(0, dtype=torch.uint8).set_(view)
    if isinstance(view, torch.Tensor):
        return raw(view)
    return bytes(view) if isinstance(view, memoryview) else view.tobytes()


async def test_a_tensor_that_torch_cannot_represent_is_named(tmp_path):
    header = {"w": {"dtype": "U8", "shape": [0, 2**63], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    for framework in ("pt", "np"):
        with pytest.raises(asyncshard.errors.UnsupportedTensorError, match="'w'"):
            await asyncshard.load(tmp_path, framework=framework)
        with pytest.raises(asyncshard.errors.UnsupportedTensorError, match="'w'"):
            await asyncshard.stream(tmp_path, framework=framework).drain()
