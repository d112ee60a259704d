"""The results of a run as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from bench.suite import Results, Rounds, ratios
from bench.targets import Row

_MIB = 1 << 20


def as_json(conditions: dict[str, object], options: dict[str, object], results: Results, rows: Iterable[Row]) -> Any:
    """Return all results as a JSON value, with the figures of every round."""
    return {
        "conditions": conditions,
        "options": options,
        "cases": {
            name: {
                "way": result.case.way,
                "options": result.case.options,
                "absent": result.absent,
                "medians": result.medians(),
                "rounds": result.rounds,
            }
            for name, result in results.items()
        },
        "ratios": _all_ratios(results),
        "targets": [
            {"what": row.what, "target": row.target, "measured": row.measured, "is_met": row.is_met} for row in rows
        ],
    }


def _all_ratios(results: Results) -> dict[str, list[float]]:
    """Return for each of the library's ways how many times faster it ran than each other way of its group."""
    pairs = {}
    for ours in results:
        group, _, way = ours.rpartition("/")
        if group in ("speed", "cold", "s3/speed", "s3/tls") and way.startswith(("load", "stream")):
            for theirs in results:
                each = ratios(results, ours, theirs) if theirs.startswith(f"{group}/") and theirs != ours else None
                if each:
                    pairs[f"{ours} : {theirs}"] = each
    return pairs


def as_markdown(conditions: dict[str, object], results: Results, rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of the report: first the table of promises, then the table of cases."""
    load = conditions["load_average"]
    yield (
        f"{conditions['cpu']}, {conditions['cores']} cores, Linux {conditions['kernel']}, "
        f"Python {conditions['python']}; load average before: {' '.join(f'{part:.2f}' for part in _floats(load))}"
    )
    yield ""
    yield "| what | target | measured | met |"
    yield "|---|---|---|---|"
    for row in rows:
        met = {True: "yes", False: "**no**", None: "not judged"}[row.is_met]
        yield f"| {row.what} | {row.target} | {row.measured} | {met} |"
    yield ""
    yield "| case | median |"
    yield "|---|---|"
    for name, result in results.items():
        yield f"| {name} | {result.absent or ', '.join(_figures(result))} |"


def _floats(values: object) -> tuple[float, ...]:
    return values if isinstance(values, tuple) else ()


def _figures(result: Rounds) -> Iterator[str]:
    medians = result.medians()
    if medians.get("bytes"):
        yield f"{result.gigabytes_per_second:.2f} GB/s"
    yield f"{medians['seconds']:.3g} s"
    if "cpu_seconds" in medians:
        yield f"{medians['cpu_seconds']:.3g} CPU s"
        if medians.get("bytes"):
            yield f"{result.gigabytes_per_cpu_second:.2f} GB per CPU second"
    yield f"load {medians['load_before']:.1f}"
    if "extra_rss_bytes" in medians:
        yield f"+{medians['extra_rss_bytes'] / _MIB:.1f} MiB"
    if "requests" in medians:
        yield f"{medians['requests']:.0f} requests"
    if "cancel_p99_ms" in medians:
        p50, p99, largest = (medians[f"cancel_{key}_ms"] for key in ("p50", "p99", "max"))
        yield f"{medians['cancels']:.0f} cancels p50 {p50:.2f} / p99 {p99:.2f} / max {largest:.1f} ms"
    if "busy.p99" in medians:
        for when in ("busy", "idle"):
            p50, p99, largest = (medians[f"{when}.{key}"] for key in ("p50", "p99", "max"))
            yield f"lag {when} p50 {p50:.2f} / p99 {p99:.2f} / max {largest:.1f} ms"
