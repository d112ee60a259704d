"""Run the benchmark and print its tables: ``python -m bench [--rounds 5] [--only NAME] [--quick]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.chart import draw
from bench.checkpoint import FULL, QUICK, Dataset
from bench.conditions import conditions
from bench.report import as_json, as_markdown
from bench.servers import Servers
from bench.suite import GROUPS, measure, select
from bench.targets import rows


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each case runs (default: 5)")
    parser.add_argument(
        "--only", metavar="NAME", help=f"a group ({', '.join(GROUPS)}), a part of one (s3/tls), a way, or a case"
    )
    parser.add_argument("--quick", action="store_true", help="a few megabytes: shows that it runs, and no more")
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="where the results go")
    parser.add_argument("--data", type=Path, help="where the generated files are kept (default: OUTPUT/data)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be 1 or more")
    if not select(options.only):
        parser.error(f"--only {options.only}: there is no such group, way or case")
    return options


def _words(only: str | None) -> str | None:
    """Return the argument of ``--only`` in a form that fits into a file's name."""
    return only and only.replace("/", "-")


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    scale = QUICK if options.quick else FULL
    before = conditions()
    data = Dataset((options.data or options.output / "data") / scale.name, scale)
    data.generate()
    if "slices" in select(options.only):
        data.generate_whole()
    with Servers(data, data.folder / "servers") as servers:
        results = measure(
            select(options.only), data, servers, options.rounds, lambda text: print(text, file=sys.stderr)
        )
    promises = list(rows(results, scale))
    options.output.mkdir(parents=True, exist_ok=True)
    name = options.output / "-".join(filter(None, ("quick" if options.quick else "bench", _words(options.only))))
    given = {"rounds": options.rounds, "only": options.only, "scale": scale.name}
    Path(f"{name}.json").write_text(json.dumps(as_json(before, given, results, promises), indent=1) + "\n")
    is_drawn = draw(results, Path(f"{name}.png"))
    print("\n".join(as_markdown(before, results, promises)))
    if not is_drawn:
        print("no chart: matplotlib is not installed, or nothing to draw was measured", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
