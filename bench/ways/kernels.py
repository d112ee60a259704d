"""Ways that time the compiled core and the functions directly above it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from asyncshard import SubtensorFilter, compute_shard_assignment, parse_header
from bench.ways.base import Case, Run, Way

_LOOK_UPS = 100_000


def _parse(case: Case, which: int) -> Run:
    """Parse and validate a header that is in memory."""
    path = case.data.header(case.data.scale.headers[which])
    data = path.read_bytes()

    def run() -> Mapping[str, float]:
        header = parse_header(data)
        case.kept[:] = [header]
        return {"tensors": len(header), "header_bytes": header.size, "held_bytes": header.nbytes}

    return run


def _look_up(case: Case) -> Run:
    """Look up names in the largest header, in random order."""
    header = parse_header(case.data.header(case.data.scale.headers[1]).read_bytes())
    indices = np.random.default_rng(0).integers(0, len(header), _LOOK_UPS)
    names = [header.at(int(index)).name for index in indices]

    def run() -> Mapping[str, float]:
        began = time.perf_counter()
        for name in names:
            header[name]
        return {"microseconds": (time.perf_counter() - began) / len(names) * 1e6}

    return run


def _views(storage: Any, count: int) -> dict[str, Any]:
    """Return views of one storage, in pairs: one view of a pair covers the other."""
    return {f"{index}": storage[index // 2 * 8 : index // 2 * 8 + 8 - index % 2] for index in range(count)}


def _filter_numpy(case: Case) -> Run:
    count = case.data.scale.views
    tensors = _views(np.zeros(4 * count + 8, np.float32), count)

    def run() -> Mapping[str, float]:
        return {"kept": len(SubtensorFilter.filter_subtensors(tensors))}

    return run


def _filter_torch(case: Case) -> Run:
    import torch

    count = case.data.scale.views
    tensors = _views(torch.zeros(4 * count + 8), count)

    def run() -> Mapping[str, float]:
        return {"kept": len(SubtensorFilter.filter_subtensors(tensors))}

    return run


def _assign(case: Case) -> Run:
    """Assign parameters of random sizes to ranks."""
    count, ranks = case.data.scale.parameters, case.data.scale.ranks
    sizes = np.random.default_rng(0).integers(1, 1 << 24, count)
    given = sizes.tolist()

    def run() -> Mapping[str, float]:
        began = time.perf_counter()
        assignment = compute_shard_assignment(count, ranks, given)
        elapsed = time.perf_counter() - began
        loads = np.bincount(assignment, sizes, ranks)
        return {"assignment_seconds": elapsed, "excess_over_mean": float(loads.max() / loads.mean() - 1)}

    return run


KERNELS = {
    "parse-header": Way(lambda case: _parse(case, 0)),
    "parse-large-header": Way(lambda case: _parse(case, 1)),
    "look-up": Way(_look_up),
    "filter-numpy": Way(_filter_numpy),
    "filter-torch": Way(_filter_torch, ("torch",)),
    "assignment": Way(_assign),
}
