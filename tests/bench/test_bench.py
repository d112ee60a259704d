"""The benchmark runs; what it measures is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_bench(folder: Path, only: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", "--quick", "--rounds", "1", "--only", only, "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("case", ["speed/load-weights-numpy", "kernels/parse-header"])
def test_a_case_runs_in_a_process_of_its_own_and_is_reported(tmp_path: Path, case: str) -> None:
    done = run_bench(tmp_path, case)

    assert done.returncode == 0, done.stderr
    assert f"| {case} |" in done.stdout
    result = json.loads((tmp_path / f"quick-{case.replace('/', '-')}.json").read_text())["cases"][case]
    assert result["absent"] is None
    assert len(result["rounds"]) == 1


def test_an_unknown_case_is_refused(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "speed/of-light")

    assert done.returncode == 2
    assert "there is no such group, way or case" in done.stderr
