"""A chart of the measured speeds and of the event loop's lags."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from bench.suite import Results

_OURS, _THEIRS = "#2563eb", "#9ca3af"
_LIBRARY_WAYS = ("load-", "stream-", "open-")


def draw(results: Results, path: Path) -> bool:
    """Write the chart as a PNG. Return False if matplotlib is not installed, or if there is nothing to draw."""
    speeds = {name: result for name, result in results.items() if name.startswith("speed/") and result.rounds}
    lags = {name: result for name, result in results.items() if name.startswith("lag/") and result.rounds}
    if importlib.util.find_spec("matplotlib") is None or not (speeds or lags):
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [max(len(group), 1) for group in (speeds, lags)]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 1.5 + 0.32 * sum(heights)), height_ratios=heights, layout="constrained"
    )
    names = [name.removeprefix("speed/") for name in speeds]
    colours = [_OURS if name.startswith(_LIBRARY_WAYS) else _THEIRS for name in names]
    above.barh(names, [result.gigabytes_per_second for result in speeds.values()], color=colours)
    for result, name in zip(speeds.values(), names, strict=True):
        each = [figures["bytes"] / figures["seconds"] / 1e9 for figures in result.rounds]
        above.plot([min(each), max(each)], [name, name], color="black", linewidth=1)
    above.set_title("Loading one rank, page cache warm (median and range)")
    above.set_xlabel("GB/s")

    names = [name.removeprefix("lag/") for name in lags]
    below.barh(names, [result.median("busy.max") for result in lags.values()], color=_THEIRS, label="max")
    below.barh(names, [result.median("busy.p99") for result in lags.values()], color=_OURS, label="p99")
    below.set_title("Event-loop lag meanwhile (medians of the rounds)")
    below.set_xlabel("ms")
    below.set_xscale("symlog", linthresh=10)
    if lags:
        below.legend()
    for axes in (above, below):
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
