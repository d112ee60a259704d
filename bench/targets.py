"""The promised figures, each beside the figure that was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from bench.checkpoint import FULL, Scale
from bench.endpoint import IN_FLIGHT, LATENCY_S
from bench.suite import (
    CACHE_BUDGET_MB,
    LAG_OF_LIBRARY,
    RESHARD_BUDGET_MB,
    ROOM_BUDGET_MB,
    S3_PEERS,
    SAFETENSORS,
    SMALL_BUDGET_MB,
    Results,
    Rounds,
    ratios,
)

_MIB = 1 << 20
_ROOM_BYTES = 16 * _MIB
"""Peak memory may exceed the budget by 16 MiB."""
_MAX_LAG_MS = 10
"""The event loop may be blocked for 10 ms."""
_STREAM_P99_MS = 4
"""The 99th percentile of the lag may be 4 ms above that of an idle loop, while tensors are streamed."""
_PLACED_P99_MS = 2
"""The 99th percentile of the lag may be 2 ms above that of an idle loop, while tensors are loaded in place."""
_S3_ROOM_BYTES = 32 * _MIB
"""Peak memory of loads from S3 may exceed the budget by 32 MiB."""
_S3_P99_MS = 3
"""The 99th percentile of the lag may be 3 ms above that of an idle loop, during loads from S3."""
_MOST_REQUESTS = 60
"""A load of many small tensors from S3 may make 60 requests."""
_LATE_BYTES_PER_S = IN_FLIGHT * _MIB / LATENCY_S
"""The speed of the slow server, if 16 requests of 1 MiB are always in flight."""


@dataclass(frozen=True, slots=True)
class Row:
    """One promise, and whether it is kept."""

    what: str
    target: str
    measured: str
    is_met: bool | None
    """None if the figure was not measured, or means nothing at this scale."""


class _NotMeasured(Exception):
    """A case has no figures; the message has its name and says why."""


def rows(results: Results, scale: Scale) -> Iterator[Row]:
    """Yield a row for each promise whose cases were selected."""
    for what, target, evaluate in _promises(scale):
        try:
            measured, is_met = evaluate(results)
            yield Row(what, target, measured, is_met if scale is FULL else None)
        except _NotMeasured as reason:
            yield Row(what, target, str(reason), None)
        except KeyError:
            continue  # the cases were not selected


_Evaluate = Callable[[Results], tuple[str, bool]]


def _promises(scale: Scale) -> Iterator[tuple[str, str, _Evaluate]]:
    small, large = (f"{count:,}" for count in scale.headers)
    yield "`load_weights` against the best of safetensors", "≥ 1.3 x", _faster("speed/load-weights", 1.3)
    yield (
        "`load_weights`, cold, against a plain sequential read, cold",
        "≥ 1.0 x",
        _faster("cold/load-weights", 1.0, "cold/sequential-read"),
    )
    for way, pages in (("stream-copy", "a new loader"), ("stream-copy-again", "a loader's second load")):
        yield f"`stream` + `copy_`, {pages}, against the best of safetensors", "≥ 0.75 x", _faster(f"speed/{way}", 0.75)
    for peer, least in (("runai-model-streamer", 4.0), ("fastsafetensors", 3.0)):
        yield (
            f"`stream` + `copy_`, a new loader, against {peer}",
            f"≥ {least:g} x",
            _faster("speed/stream-copy", least, f"speed/{peer}"),
        )
    yield "extra peak RSS of `load_weights`", "≤ 16 MiB", _memory("memory/load-weights", 0)
    for way, budget in (
        ("stream-count", ROOM_BUDGET_MB),
        ("stream-copy", ROOM_BUDGET_MB),
        ("stream-copy-layers", SMALL_BUDGET_MB),
    ):
        what = f"extra peak RSS of `{way}` with a budget of {budget} MiB"
        yield what, f"≤ {budget + 16} MiB", _memory(f"memory/{way}", budget)
    yield from _lags()
    for way, count, most in (("parse-header", small, 0.06), ("parse-large-header", large, 0.6)):
        yield f"header of {count} tensors, parsed and validated", f"≤ {most} s", _seconds(f"kernels/{way}", most)
    yield f"memory to open a header of {large} tensors ÷ its bytes", "≤ 2.5 x", _header_memory
    yield f"look-up of a name among {large}", "≤ 2 µs", _most("kernels/look-up", "microseconds", 2, "µs")
    for library in ("numpy", "torch"):
        what = f"`filter_subtensors`, {scale.views:,} views of one storage, {library}"
        yield what, "≤ 0.5 s", _seconds(f"kernels/filter-{library}", 0.5)
    what = f"`compute_shard_assignment`, {scale.parameters:,} parameters, {scale.ranks:,} ranks"
    yield what, "≤ 0.5 s", _most("kernels/assignment", "assignment_seconds", 0.5, "s")
    yield f"{what}: largest rank over the mean", "≤ 1 %", _excess
    for library, most in (("numpy", 4), ("torch", 10)):
        yield (
            f"`stream`, a tensor of {scale.small_tensors:,} of 4 bytes, {library}",
            f"≤ {most} µs",
            _most(f"kernels/stream-small-{library}", "microseconds_per_tensor", most, "µs"),
        )
    yield from _s3_promises()
    yield from _cache_promises()
    yield from _slices_promises(scale)


def _cache_promises() -> Iterator[tuple[str, str, _Evaluate]]:
    what = "`load_shard` of a shard in memory, over a look-up in a dict and an `await`"
    yield what, "≤ 5 µs", _most("cache/hit", "over_floor_us", 5, "µs")
    what = f"extra peak RSS of `load_weights_incremental` with a budget of {CACHE_BUDGET_MB} MiB"
    yield what, f"≤ {CACHE_BUDGET_MB + 16} MiB", _memory("cache/incremental", CACHE_BUDGET_MB)
    what = "8 processes load the same objects with one `cache_dir`: bytes that the server sends, of one copy"
    yield what, "≤ 1.01 x", _sent
    yield (
        "first load from S3, while `cache_dir` is written, against one without it",
        "≥ 0.8 x",
        _faster("cache/disk/first", 0.8, "cache/disk/without"),
    )
    for way, what, least in (("second", "while verifying", 0.6), ("verified", "once verified", 0.95)):
        what = f"load of what is in `cache_dir`, {what}, against a local one"
        yield what, f"≥ {least:g} x", _faster(f"cache/disk/{way}", least, "cache/disk/local")
    what = "`prepare_refresh`, a hundredth of the bytes changed: bytes read, of all"
    yield what, "≤ 1.1 %", _read_share
    for name, what in (("refresh", "a hundredth of 1.5 GB"), ("refresh-all", "all of 1.5 GB")):
        what = f"`Update.apply`, {what}, against a copy of the same tensors"
        yield what, "≤ 2 x", _most(f"cache/{name}", "apply_over_memcpy", 2, "x")


def _slices_promises(scale: Scale) -> Iterator[tuple[str, str, _Evaluate]]:
    yield "bytes read of rank 0 of 8, all matrices cut along their rows, of those needed", "≤ 1.02 x", _read_over_needed
    for plan, what in (("columns", "rows"), ("model", "rows, and columns of two matrices")):
        for way, other, least in (("get-slice", "safetensors' `get_slice`", 1.0), ("full", "a full read, sliced", 4.0)):
            yield (
                f"load of rank 0 of 8, {what}, against {other}",
                f"≥ {least:g} x" if plan == "columns" else "-",
                _faster(f"slices/{plan}/ours", least if plan == "columns" else 0.0, f"slices/{plan}/{way}"),
            )
    what = "gather of the columns of each of 8 ranks, bf16, 4096 x 14336, of memcpy's speed"
    yield what, "≥ 0.7 x", _least("slices/gather", "of_memcpy", 0.7)
    what = f"plan of one of 64 ranks, {scale.pages:,} tensors"
    yield what, "≤ 0.5 s", _seconds("slices/plan-slices", 0.5)
    for copy, other in (("copy", "`cp`"), ("copy-flushed", "`cp` and a flush, as `reshard` does")):
        what = f"`reshard` of 3 GB from 1 to 8 ranks against {other}"
        yield what, "≥ 0.5 x", _faster("slices/reshard", 0.5, f"slices/{copy}")
    what = f"extra peak RSS of `reshard` with a budget of {RESHARD_BUDGET_MB} MiB"
    yield what, f"≤ {RESHARD_BUDGET_MB + 32} MiB", _memory("slices/reshard", RESHARD_BUDGET_MB, 2 * _ROOM_BYTES)


def _s3_promises() -> Iterator[tuple[str, str, _Evaluate]]:
    for kind, peer, least in (
        ("speed", "obstore", 3.0),
        ("speed", "aiobotocore", 8.0),
        ("speed", "runai-model-streamer", 15.0),
        ("tls", "obstore", 1.2),
        ("tls", "aiobotocore", 3.0),
    ):
        what = f"S3{' over TLS' * (kind == 'tls')}: bytes per client CPU second of `load_weights` against {peer}"
        yield what, f"≥ {least:g} x", _cheaper(f"s3/{kind}/load-weights", least, f"s3/{kind}/{peer}")
    for peer in S3_PEERS:
        yield (
            f"S3: `load_weights` against {peer}",
            "≥ 1.0 x",
            _faster("s3/speed/load-weights", 1.0, f"s3/speed/{peer}"),
        )
    for way, budget in (("load-weights", 0), ("stream-count", ROOM_BUDGET_MB)):
        what = f"S3: extra peak RSS of `{way}`" + f" with a budget of {budget} MiB" * bool(budget)
        yield what, f"≤ {budget + 32} MiB", _memory(f"s3/memory/{way}", budget, _S3_ROOM_BYTES)
        for loop in ("asyncio", "uvloop"):
            target = f"p99 ≤ {_S3_P99_MS} ms over idle, max ≤ {_MAX_LAG_MS} ms"
            yield f"S3: event-loop lag during `{way}`, {loop}", target, _lag(f"s3/lag/{way}/{loop}", _S3_P99_MS)
    for way in ("load-pages", "stream-pages"):
        what = f"S3: requests of `{way}`, from the URL on"
        yield what, f"≤ {_MOST_REQUESTS}", _most(f"s3/requests/{way}", "requests", _MOST_REQUESTS, "requests")
    what = f"S3: `load_weights` with {LATENCY_S * 1e3:g} ms for each answer, of {IN_FLIGHT} x 1 MiB / latency"
    yield what, "≥ 0.8 x", _late
    for way, begin in (("cancel", "a store that is open"), ("cancel-from-url", "the URL on")):
        what = f"S3: cancel to done, random points of a load, from {begin}"
        yield what, "p99 ≤ 50 ms, nothing left", _cancel(f"s3/cancel/{way}")


def _lags() -> Iterator[tuple[str, str, _Evaluate]]:
    for way in LAG_OF_LIBRARY:
        if way == "stream-copy":
            continue  # its consumer copies on the event loop: the lag is no fault of the library
        p99 = _STREAM_P99_MS if way.startswith(("stream-count", "stream-small")) else _PLACED_P99_MS
        for loop in ("asyncio", "uvloop"):
            target = f"p99 ≤ {p99} ms over idle, max ≤ {_MAX_LAG_MS} ms"
            yield f"event-loop lag during `{way}`, {loop}", target, _lag(f"lag/{way}/{loop}", p99)


def _rounds(results: Results, name: str) -> Rounds:
    result = results[name]
    if result.absent is not None or not result.rounds:
        raise _NotMeasured(f"{name}: {result.absent}")
    return result


def best_of_safetensors(results: Results) -> str:
    """Return the name of the case of safetensors with the shortest median time."""
    cases = [f"speed/{way}" for way in SAFETENSORS]
    return min(cases, key=lambda name: _rounds(results, name).median("seconds"))


def _faster(ours: str, least: float, theirs: str | None = None) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        other = theirs or best_of_safetensors(results)
        _rounds(results, ours), _rounds(results, other)
        each = ratios(results, ours, other) or []
        ratio = statistics.median(each)
        of = "" if theirs else f" {other.removeprefix('speed/')}"
        speeds = [_rounds(results, name).gigabytes_per_second for name in (ours, other)]
        text = f"{ratio:.2f} x{of} ({min(each):.2f} to {max(each):.2f}); {speeds[0]:.2f} and {speeds[1]:.2f} GB/s"
        return text, ratio >= least

    return evaluate


def _cheaper(ours: str, least: float, theirs: str) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        rates = [_rounds(results, name).gigabytes_per_cpu_second for name in (ours, theirs)]
        each = ratios(results, ours, theirs, "cpu_seconds") or []
        ratio = statistics.median(each)
        text = (
            f"{ratio:.2f} x ({min(each):.2f} to {max(each):.2f}); {rates[0]:.2f} and {rates[1]:.2f} GB per CPU second"
        )
        return text, ratio >= least

    return evaluate


def _memory(name: str, budget_mb: int, room_bytes: int = _ROOM_BYTES) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        worst = max(_rounds(results, name).values("extra_rss_bytes"))
        return f"{worst / _MIB:.1f} MiB at most", worst <= budget_mb * _MIB + room_bytes

    return evaluate


def _lag(name: str, p99_ms: float) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        result = _rounds(results, name)
        over = statistics.median(
            busy - idle for busy, idle in zip(result.values("busy.p99"), result.values("idle.p99"), strict=True)
        )
        largest = result.median("busy.max")
        text = (
            f"p99 {over:.1f} ms over idle, max {largest:.1f} ms (worst {max(result.values('busy.max')):.1f}; "
            f"idle p99 {result.median('idle.p99'):.1f}, max {result.median('idle.max'):.1f})"
        )
        return text, over <= p99_ms and largest <= _MAX_LAG_MS

    return evaluate


def _most(name: str, key: str, most: float, unit: str) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        value = _rounds(results, name).median(key)
        return f"{value:.3g} {unit}", value <= most

    return evaluate


def _least(name: str, key: str, least: float) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        value = _rounds(results, name).median(key)
        return f"{value:.2f} x", value >= least

    return evaluate


def _seconds(name: str, most: float) -> _Evaluate:
    return _most(name, "seconds", most, "s")


def _late(results: Results) -> tuple[str, bool]:
    share = _rounds(results, "s3/late/load-weights").gigabytes_per_second * 1e9 / _LATE_BYTES_PER_S
    return f"{share:.2f} x", share >= 0.8


def _cancel(name: str) -> _Evaluate:
    def evaluate(results: Results) -> tuple[str, bool]:
        result = _rounds(results, name)
        p50, p99, largest = (result.median(f"cancel_{key}_ms") for key in ("p50", "p99", "max"))
        count = result.median("cancels")
        return f"p50 {p50:.2f} ms, p99 {p99:.1f} ms, max {largest:.1f} ms of {count:,.0f}; nothing left", p99 <= 50

    return evaluate


def _sent(results: Results) -> tuple[str, bool]:
    result = _rounds(results, "cache/disk/processes")
    share = result.median("sent_bytes") / result.median("object_bytes")
    return f"{share:.4f} x", share <= 1.01


def _read_share(results: Results) -> tuple[str, bool]:
    share = _rounds(results, "cache/refresh").median("read_share")
    return f"{share:.2%}", share <= 0.011


def _read_over_needed(results: Results) -> tuple[str, bool]:
    result = _rounds(results, "slices/columns/ours")
    share = result.median("bytes_read") / result.median("bytes_needed")
    return f"{share:.4f} x", share <= 1.02


def _header_memory(results: Results) -> tuple[str, bool]:
    result = _rounds(results, "kernels/open-large-header")
    size = result.median("header_bytes")
    peak, held = (result.median(key) / size for key in ("extra_rss_bytes", "held_bytes"))
    return f"{peak:.2f} x at its peak, {held:.2f} x after it ({size / 1e6:.0f} MB)", peak <= 2.5


def _excess(results: Results) -> tuple[str, bool]:
    excess = _rounds(results, "kernels/assignment").median("excess_over_mean")
    return f"{excess:.2g}", excess <= 0.01
