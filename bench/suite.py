"""The groups of cases that are measured together, and running them.

Each case runs in a process of its own. The cases of a group take turns (A B C A B C), so that a change of the machine's
speed affects all of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.checkpoint import Dataset
from bench.servers import Absent, Servers

ROOM_BUDGET_MB = 320
"""A budget of 320 MiB has room for the rank's largest tensor, of 251 MiB."""
SMALL_BUDGET_MB = 64
"""A budget of 64 MiB is much smaller than the rank."""
CACHE_BUDGET_MB = 256
"""The memory cache of `IncrementalShardLoader` has 256 MiB."""
RESHARD_BUDGET_MB = 512
"""`reshard` has a budget of 512 MiB."""
_CASE_S = 600
"""A case that runs for 600 seconds is ended."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One case: a way of loading, and the options with which it runs."""

    name: str
    way: str
    options: tuple[str, ...] = ()
    """Command-line arguments of `bench.way`."""
    server: str | None = None
    """The kind of server that the case loads from; None for no server."""
    is_once: bool = False
    """Whether the case runs in the first round only, because it takes long and repeats its work itself."""


@dataclass(slots=True)
class Rounds:
    """The figures of one case in each round."""

    case: Measured
    rounds: list[dict[str, Any]] = field(default_factory=list)
    absent: str | None = None
    """Why the case has no figures; None if it has."""

    def values(self, key: str) -> list[float]:
        """Return one figure of every round. A key such as ``busy.p99`` names a figure within a figure."""
        return [_figure(figures, key) for figures in self.rounds]

    def median(self, key: str) -> float:
        return statistics.median(self.values(key))

    @property
    def gigabytes_per_cpu_second(self) -> float:
        return statistics.median(figures["bytes"] / figures["cpu_seconds"] / 1e9 for figures in self.rounds)

    @property
    def gigabytes_per_second(self) -> float:
        return statistics.median(figures["bytes"] / figures["seconds"] / 1e9 for figures in self.rounds)

    def medians(self) -> dict[str, float]:
        """Return the median of every figure."""
        return {key: self.median(key) for key in _keys(self.rounds[0])} if self.rounds else {}


Results = dict[str, Rounds]


def _figure(figures: dict[str, Any], key: str) -> float:
    value: Any = figures
    for part in key.split("."):
        value = value[part]
    return float(value)


def _keys(figures: dict[str, Any]) -> Iterable[str]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in value)
        else:
            yield key


def _group(group: str, ways: Iterable[str], *options: str) -> list[Measured]:
    return [Measured(f"{group}/{way}", way, options) for way in ways]


def _lag(ways: Iterable[str]) -> list[Measured]:
    return [
        Measured(f"lag/{way}/{loop}", way, ("--lag", "--loop", loop)) for way in ways for loop in ("asyncio", "uvloop")
    ]


S3_PEERS = ("obstore", "aiobotocore", "runai-model-streamer")
S3_TLS_PEERS = S3_PEERS[:2]
"""The peers that can be told which certificates to trust."""


def _s3() -> list[Measured]:
    def on(server: str, name: str, way: str, *options: str, is_once: bool = False) -> Measured:
        return Measured(f"s3/{name}", f"s3-{way}", options, server, is_once)

    budget = ("--budget-mb", str(ROOM_BUDGET_MB))
    lags = [(way, loop) for way in ("load-weights", "stream-count") for loop in ("asyncio", "uvloop")]
    return [
        *(on("seaweedfs", f"speed/{way}", way) for way in ("load-weights", *S3_PEERS, "load-weights-from-url")),
        *(on("nginx-tls", f"tls/{way}", way) for way in ("load-weights", *S3_TLS_PEERS)),
        on("seaweedfs", "memory/load-weights", "load-weights"),
        on("seaweedfs", "memory/stream-count", "stream-count", *budget),
        *(on("seaweedfs", f"lag/{way}/{loop}", way, "--lag", "--loop", loop) for way, loop in lags),
        *(on("nginx", f"requests/{way}", way) for way in ("load-pages", "stream-pages")),
        on("late", "late/load-weights", "load-late"),
        *(on("nginx", f"cancel/{way}", way, is_once=True) for way in ("cancel", "cancel-from-url")),
    ]


SAFETENSORS = ("safetensors-safe-open", "safetensors-safe-open-pread", "safetensors-load-file")
"""The ways of safetensors. Torch chooses the number of threads of their `copy_`."""
LAG_OF_LIBRARY = (
    "load-weights",
    "stream-count",
    "stream-into",
    "stream-copy",
    "open-header",
    "stream-small-numpy",
    "stream-small-torch",
)

GROUPS: dict[str, list[Measured]] = {
    "speed": _group(
        "speed",
        (
            "memcpy",
            "sequential-read",
            "load-weights",
            "load-weights-numpy",
            "stream-copy",
            "stream-copy-again",
            "stream-into",
            "load-new",
            *SAFETENSORS,
            "safetensors-safe-open-one-thread",
            "fastsafetensors",
            "runai-model-streamer",
        ),
    ),
    "cold": _group("cold", ("sequential-read", "load-weights", "stream-copy", "safetensors-load-file"), "--cold"),
    "memory": [
        Measured("memory/load-weights", "load-weights"),
        *_group("memory", ("stream-count", "stream-copy"), "--budget-mb", str(ROOM_BUDGET_MB)),
        Measured("memory/stream-copy-layers", "stream-copy-layers", ("--budget-mb", str(SMALL_BUDGET_MB))),
    ],
    "lag": [*_lag(LAG_OF_LIBRARY), Measured("lag/safetensors-load-file/asyncio", "safetensors-load-file", ("--lag",))],
    "kernels": _group(
        "kernels",
        (
            "parse-header",
            "parse-large-header",
            "open-large-header",
            "look-up",
            "filter-numpy",
            "filter-torch",
            "assignment",
            "stream-small-numpy",
            "stream-small-torch",
        ),
    ),
    "s3": _s3(),
    "cache": [
        Measured("cache/hit", "incremental-hit"),
        Measured("cache/incremental", "incremental-load", ("--budget-mb", str(CACHE_BUDGET_MB))),
        *(Measured(f"cache/disk/{way}", f"cached-{way}", (), "seaweedfs") for way in ("first", "second", "verified")),
        *(Measured(f"cache/disk/{way}", f"cached-{way}") for way in ("local", "disk")),
        Measured("cache/disk/without", "s3-load-weights", (), "seaweedfs"),
        Measured("cache/disk/processes", "cached-processes", (), "seaweedfs"),
        Measured("cache/refresh", "refresh"),
        Measured("cache/refresh-all", "refresh-all"),
    ],
    "slices": [
        *(
            Measured(f"slices/{plan}/{way or 'ours'}", f"slices-{plan}{'-' * bool(way)}{way}")
            for plan in ("columns", "model")
            for way in ("", "get-slice", "full")
        ),
        *_group("slices", ("gather", "plan-slices")),
        Measured("slices/reshard", "reshard", ("--budget-mb", str(RESHARD_BUDGET_MB))),
        *_group("slices", ("copy", "copy-flushed")),
    ],
}


def select(only: str | None) -> dict[str, list[Measured]]:
    """Return the groups with the cases that `only` names: a group, a part of one, a way, or a case; None for all."""
    chosen = {
        group: [case for case in cases if only in (None, case.way, case.name) or case.name.startswith(f"{only}/")]
        for group, cases in GROUPS.items()
    }
    return {group: cases for group, cases in chosen.items() if cases}


def measure(
    groups: dict[str, list[Measured]], data: Dataset, servers: Servers, rounds: int, tell: Callable[[str], object]
) -> Results:
    """Run the cases of each group in turn, `rounds` times; return the figures."""
    results: Results = {}
    for cases in groups.values():
        results.update((case.name, Rounds(case)) for case in cases)
        for number in range(1, rounds + 1):
            for case in cases:
                result = results[case.name]
                if result.absent is None and (number == 1 or not case.is_once):
                    tell(f"round {number} of {rounds}: {case.name}")
                    load = os.getloadavg()[0]
                    figures = run_case(case, data, servers) | {"load_before": load}
                    result.absent = figures.get("absent")
                    if result.absent is None:
                        result.rounds.append(figures)
    return results


def run_case(case: Measured, data: Dataset, servers: Servers) -> dict[str, Any]:
    """Run one case in a process of its own; return its figures, or the reason for which it has none as ``absent``."""
    if case.server is None:
        return _run_way(case, data)
    try:
        endpoint = servers.endpoint(case.server)
    except Absent as reason:
        return {"absent": str(reason)}
    before = servers.counts(case.server)
    figures = _run_way(case, data, *endpoint.arguments())
    after = servers.counts(case.server)
    return figures | {name: count - before[name] for name, count in after.items()}


def _run_way(case: Measured, data: Dataset, *more: str) -> dict[str, Any]:
    place = ("--path", str(data.folder), "--scale", data.scale.name, *more)
    command = [sys.executable, "-m", "bench.way", case.way, *place, *case.options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_CASE_S)
    except subprocess.TimeoutExpired:
        return {"absent": f"failed: it hung, and was ended after {_CASE_S} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.splitlines() or ["no output"])[-1]
        return {"absent": f"failed with exit status {done.returncode}: {reason}"}
    figures: dict[str, Any] = json.loads(lines[-1])
    return figures


def ratios(results: Results, numerator: str, denominator: str, key: str = "seconds") -> list[float] | None:
    """Return for each round how many times faster the numerator ran than the denominator; None if one did not run.

    With another key, such as ``cpu_seconds``, return how many times less of that the numerator took.
    """
    pair = [results.get(name) for name in (numerator, denominator)]
    if any(result is None or result.absent is not None or not result.rounds for result in pair):
        return None
    ours, theirs = pair
    assert ours is not None
    assert theirs is not None
    return [theirs_s / ours_s for ours_s, theirs_s in zip(ours.values(key), theirs.values(key), strict=False)]
