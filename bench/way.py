"""Run one way of loading in this process and print its figures: ``python -m bench.way NAME --path FOLDER``.

Imports, the allocation of destinations and the first touch of their pages come before the clock starts. The loaded
values are checked after it has stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import inspect
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from bench.checkpoint import SCALES, Dataset
from bench.endpoint import Endpoint
from bench.measure import PeakMemory, Ticker, drop_from_page_cache, read_into_page_cache
from bench.ways import WAYS
from bench.ways.base import Case, Run, Way

IDLE_S = 1.0
"""The idle event loop is watched for 1 second."""
BUSY_S = {"full": 2.0, "quick": 0.5}
"""The busy event loop is watched for 2 seconds, or 0.5 at the quick scale: one load alone has too few ticks."""
COLD_SHARE = 0.01
"""A load counts as cold if at most 1 % of its files are in the page cache."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.way", description=__doc__)
    parser.add_argument("name", choices=sorted(WAYS), metavar="NAME", help=f"one of {', '.join(WAYS)}")
    parser.add_argument("--path", type=Path, required=True, help="the folder of generated files")
    parser.add_argument("--scale", choices=sorted(SCALES), default="full")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio")
    parser.add_argument("--lag", action="store_true", help="load again and again, and watch the loop's lag")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache first")
    parser.add_argument("--budget-mb", type=int, help="the memory budget, where the way has one")
    parser.add_argument("--endpoint-url", help="the server, where the way has one")
    parser.add_argument("--ca-file", help="whom to trust about the server's certificate")
    return parser.parse_args(arguments)


def cost_of(way: Way, case: Case, *, loop: str, is_cold: bool, is_lag: bool) -> dict[str, Any]:
    """Return the figures of one way, or the reason for which it has none as ``absent``."""
    absent = [name for name in way.needs if importlib.util.find_spec(name) is None]
    if loop == "uvloop" and importlib.util.find_spec("uvloop") is None:
        absent.append("uvloop")
    if absent:
        return {"absent": f"not installed: {', '.join(absent)}"}
    run = way.prepare(case)
    cached = drop_from_page_cache(case.data.files) if is_cold else 1.0
    if is_cold and cached > COLD_SHARE:
        return {"absent": f"not measured: {cached:.0%} stayed in the page cache"}
    if not is_cold:
        read_into_page_cache(case.data.files)
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        figures = runner.run(_measure(case, run, is_lag=is_lag))
    case.check()
    return {"bytes": case.nbytes, **figures}


async def _measure(case: Case, run: Run, *, is_lag: bool) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        if case.open is not None:
            await case.open(stack)
        gc.collect()
        gc.freeze()  # so that the garbage collector does not look at objects from before
        return await (_watch(run, BUSY_S[case.data.scale.name]) if is_lag else _time(run))


async def _time(run: Run) -> dict[str, Any]:
    """Run a way once, and measure its time and its memory."""
    with PeakMemory() as memory:
        cpu, began = _cpu_seconds(), time.perf_counter()
        extra = await _result(run())
        seconds = time.perf_counter() - began
        cpu = _cpu_seconds() - cpu
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "extra_rss_bytes": memory.extra_bytes,
        "is_rss_exact": memory.is_exact,
        **extra,
    }


async def _watch(run: Run, busy_s: float) -> dict[str, Any]:
    """Run a way again and again beside a ticker. A way that is no coroutine runs in a thread, as in an application."""
    async with Ticker() as idle:
        await asyncio.sleep(IDLE_S)
    loads = 0
    async with Ticker() as busy:
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < busy_s:
            await (_result(run()) if inspect.iscoroutinefunction(run) else asyncio.to_thread(run))
            loads += 1
    return {"seconds": elapsed / loads, "loads": loads, "idle": idle.milliseconds(), "busy": busy.milliseconds()}


async def _result(result: Awaitable[Mapping[str, float] | None] | Mapping[str, float] | None) -> Mapping[str, float]:
    return (await result if inspect.isawaitable(result) else result) or {}


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    endpoint = Endpoint(options.endpoint_url, options.ca_file) if options.endpoint_url else None
    case = Case(Dataset(options.path, SCALES[options.scale]), options.budget_mb, endpoint)
    figures = cost_of(WAYS[options.name], case, loop=options.loop, is_cold=options.cold, is_lag=options.lag)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
