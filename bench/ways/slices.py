"""Ways that load one rank's slices of a checkpoint that was not cut for ranks, and ways that reshard it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np

from asyncshard import ShardedStateLoader, parse_header, reshard
from asyncshard._core import copy_runs
from asyncshard.arrays.frameworks import load_library
from asyncshard.format.header import format_header
from asyncshard.plan.file_slices.planner import make_file_slice
from asyncshard.plan.tp.plan import TpPlan
from bench.checkpoint import Tensor
from bench.ways.base import Case, Run, Way, touch_memory

_RANK, _RANKS = 0, 8
_MANY_RANKS = 64
_COLWISE = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)
_ROWWISE = ("o_proj", "down_proj")
_LAYER = "model.layers.*"

# What every way loads: all matrices of the layers, each cut along its rows.
COLUMNS = {f"{_LAYER}.{module}.{name}": "colwise" for name, module in _COLWISE.items()}
# As a model is divided: two of the matrices along the last dimension.
MODEL = COLUMNS | {f"{_LAYER}.{_COLWISE[name]}.{name}": "rowwise" for name in _ROWWISE}


def _is_wanted(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _dim_of(name: str, plan: Mapping[str, str]) -> int:
    return 1 if plan is MODEL and name.split(".")[-2] in _ROWWISE else 0


def _tensors(case: Case) -> list[Tensor]:
    return [placed.tensor for path in case.data.whole_files for placed in case.data.tensors(path)]


def _destinations(case: Case, plan: Mapping[str, str]) -> dict[str, Any]:
    """Return torch tensors for the rank's slices, with all pages touched."""
    import torch

    state = {}
    for tensor in _tensors(case):
        if _is_wanted(tensor.name):
            shape = list(tensor.shape)
            shape[_dim_of(tensor.name, plan)] //= _RANKS
            state[tensor.name] = torch.empty(shape, dtype=torch.bfloat16).fill_(0)
    case.nbytes = sum(tensor.nbytes for tensor in state.values())
    case.verify = lambda: _compare(case, state, plan)
    return state


def _compare(case: Case, state: Mapping[str, Any], plan: Mapping[str, str]) -> None:
    """Compare every slice with the one that safetensors reads."""
    import torch
    from safetensors import safe_open

    for path in case.data.whole_files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                if name in state:
                    piece = file.get_tensor(name).chunk(_RANKS, _dim_of(name, plan))[_RANK]
                    if not torch.equal(piece.contiguous().view(torch.uint8), state[name].view(torch.uint8)):
                        raise AssertionError(f"{name} was not loaded")


def _load(case: Case, plan: Mapping[str, str]) -> Run:
    state = _destinations(case, plan)
    loader = ShardedStateLoader(rank=_RANK, world_size=_RANKS, framework="pt", tp_plan=plan, tensor_filter=_is_wanted)
    load_library(loader.options.framework)

    planned = asyncio.run(loader.plan_weights(case.data.whole))

    async def run() -> Mapping[str, float]:
        await loader.load_weights(case.data.whole, state)
        return {"bytes_read": planned.bytes_read, "bytes_needed": planned.bytes_needed}

    return run


def _columns(case: Case) -> Run:
    """Load a rank's slices into its parameters; all matrices are cut along their rows."""
    return _load(case, COLUMNS)


def _model(case: Case) -> Run:
    """Load a rank's slices into its parameters; two of the matrices are cut along the last dimension."""
    return _load(case, MODEL)


def _get_slice(case: Case, plan: Mapping[str, str]) -> Run:
    from safetensors import safe_open

    state = _destinations(case, plan)

    def run() -> None:
        for path in case.data.whole_files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in state:
                        part = file.get_slice(name)
                        size = state[name].shape[_dim_of(name, plan)]
                        rows = slice(_RANK * size, (_RANK + 1) * size)
                        state[name].copy_(part[:, rows] if _dim_of(name, plan) else part[rows])

    return run


def _full(case: Case, plan: Mapping[str, str]) -> Run:
    from safetensors.torch import load

    state = _destinations(case, plan)

    def run() -> None:
        for path in case.data.whole_files:
            for name, tensor in load(path.read_bytes()).items():
                if name in state:
                    state[name].copy_(tensor.chunk(_RANKS, _dim_of(name, plan))[_RANK])

    return run


def _gather(case: Case) -> Run:
    """Gather the columns of one rank of eight from a matrix, and in turn copy the same number of bytes in one piece."""
    rows, columns = 4096, 14336 * 2
    length = columns // _RANKS
    source = np.ones(rows * columns, np.uint8)
    target = np.ones(rows * length, np.uint8)
    # As the other one: memory that is read once, and written where it was written before.
    plain = np.ones(rows * length, np.uint8)
    offsets = [np.arange(rows, dtype=np.int64) * columns + rank * length for rank in range(_RANKS)]
    places = np.arange(rows, dtype=np.int64) * length
    lengths = np.full(rows, length, np.int64)
    case.nbytes = 2 * source.nbytes

    def run() -> Mapping[str, float]:
        gather, copy = [], []
        for _ in range(9):
            began = time.perf_counter()
            for rank in range(_RANKS):
                copy_runs(source, target, offsets[rank], places, lengths)
            gather.append(time.perf_counter() - began)
            began = time.perf_counter()
            for rank in range(_RANKS):
                plain[:] = source[rank * len(plain) : (rank + 1) * len(plain)]
            copy.append(time.perf_counter() - began)
        ratios = sorted(plain_s / gather_s for plain_s, gather_s in zip(copy, gather, strict=True))
        return {"of_memcpy": ratios[len(ratios) // 2]}

    return run


def _plan(case: Case) -> Run:
    """Plan the slices of one rank of 64, for a checkpoint of very many tensors whose header is in memory."""
    count = case.data.scale.pages
    shapes = {"q_proj": (4096, 4096), "o_proj": (4096, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)}
    entries = [
        (f"model.layers.{number // len(shapes)}.{_COLWISE[name]}.{name}.weight", "BF16", shape, 2 * shape[0] * shape[1])
        for number, (name, shape) in zip(range(count), list(shapes.items()) * (count // len(shapes) + 1), strict=False)
    ]
    text = format_header(iter(entries), {})
    size = len(text) + sum(nbytes for *_, nbytes in entries)

    def run() -> Mapping[str, float]:
        header = parse_header(text, size)
        plan = TpPlan({key: word for key, word in MODEL.items() if key.split(".")[-1] in shapes})
        plan.check([header.table])
        part = make_file_slice(header, plan, None, rank=3, world_size=_MANY_RANKS, path="")
        assert part is not None
        return {"tensors": len(part.header)}

    return run


def _reshard(case: Case) -> Run:
    """Reshard the checkpoint to eight ranks, on the same disk."""
    target = case.data.folder / "resharded"

    async def run() -> None:
        await reshard(case.data.whole, target, world_size=_RANKS, tp_plan=MODEL, memory_budget_mb=case.budget_mb)

    return _writing(case, target, run)


def _copy(case: Case) -> Run:
    """Copy the checkpoint with `cp`, on the same disk, and flush it."""
    target = case.data.folder / "copied"

    def run() -> None:
        target.mkdir()
        subprocess.run(["cp", *map(os.fspath, case.data.whole_files), os.fspath(target)], check=True)
        for path in target.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return _writing(case, target, run)


def _copy_unflushed(case: Case) -> Run:
    """Copy the checkpoint with `cp` into the page cache."""
    target = case.data.folder / "copied"

    def run() -> None:
        target.mkdir()
        subprocess.run(["cp", *map(os.fspath, case.data.whole_files), os.fspath(target)], check=True)

    return _writing(case, target, run)


def _writing(case: Case, target: Path, run: Callable[[], Awaitable[None] | None]) -> Run:
    case.nbytes = sum(path.stat().st_size for path in case.data.whole_files)

    async def begin(stack: AsyncExitStack) -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()  # what others have written is not to be waited for
        touch_memory(case.data.folder, case.nbytes)
        stack.callback(shutil.rmtree, target, ignore_errors=True)

    case.open = begin
    return run


_NEEDS = ("torch", "safetensors")

SLICES = {
    "slices-columns": Way(_columns, _NEEDS),
    "slices-model": Way(_model, _NEEDS),
    "slices-columns-get-slice": Way(lambda case: _get_slice(case, COLUMNS), _NEEDS),
    "slices-model-get-slice": Way(lambda case: _get_slice(case, MODEL), _NEEDS),
    "slices-columns-full": Way(lambda case: _full(case, COLUMNS), _NEEDS),
    "slices-model-full": Way(lambda case: _full(case, MODEL), _NEEDS),
    "gather": Way(_gather),
    "plan-slices": Way(_plan),
    "reshard": Way(_reshard),
    "copy-flushed": Way(_copy),
    "copy": Way(_copy_unflushed),
}
