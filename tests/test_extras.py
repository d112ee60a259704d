"""What is said where an optional package is missing. ``make test-extras`` tries it in environments that lack it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import asyncshard
from asyncshard.extras import PACKAGES, require
from asyncshard.stores import from_url

ROOT = Path(__file__).parents[1]
EXTRAS: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def packages_of(extra: str) -> set[str]:
    """Return the packages that an extra brings, those of the extras that it contains too."""
    found = set()
    for requirement in EXTRAS[extra]:
        match = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", requirement)
        assert match is not None
        if match[1] == "asyncshard":
            found |= set().union(*map(packages_of, match[2].split(",")))
        else:
            found.add(match[1])
    return found


def lack(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


def test_the_table_of_what_extras_promise_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tests" / "extras")
    assert importlib.import_module("promises").PROMISES.keys() == EXTRAS.keys() - {"test"}


@pytest.mark.parametrize("extra", PACKAGES)
def test_an_extra_brings_the_packages_that_the_library_imports_of_it(extra: str) -> None:
    assert set(PACKAGES[extra]) == packages_of(extra)


@pytest.mark.parametrize("extra", PACKAGES)
def test_the_readme_names_the_extra(extra: str) -> None:
    assert f"| `'asyncshard[{extra}]'` |" in (ROOT / "README.md").read_text()


def test_what_is_installed_needs_no_sentence() -> None:
    require("this test", "aiobotocore", "h11")


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        (["h11"], "it: h11 is not installed: pip install 'asyncshard[s3]'"),
        (["awscrt"], "it: awscrt is not installed: pip install 'asyncshard[checksums]'"),
        (
            ["aiobotocore", "awscrt"],
            "it: aiobotocore and awscrt are not installed: pip install 'asyncshard[checksums]'",
        ),
    ],
)
def test_the_smallest_extra_that_brings_all_that_is_missing_is_named(
    missing: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack(monkeypatch, *missing)
    with pytest.raises(ImportError) as caught:
        require("it", "aiobotocore", "h11", "awscrt")
    assert str(caught.value) == sentence
    assert caught.value.name == missing[0]


@pytest.mark.parametrize("package", ["aiobotocore", "h11"])
def test_s3_without_its_packages_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"s3://bucket/key: {package} is not .* 'asyncshard\[s3\]'"):
        from_url("s3://bucket/key")


def test_only_verified_checksums_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, "awscrt")
    from_url("s3://bucket/key")
    with pytest.raises(ImportError, match=r"verify_checksums: awscrt is not .* 'asyncshard\[checksums\]'"):
        from_url("s3://bucket/key", verify_checksums=True)


@pytest.mark.parametrize("package", ["filelock", "xxhash"])
def test_a_cache_without_its_packages_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lack(monkeypatch, package)
    with pytest.raises(ImportError, match=rf"cache_dir: {package} is not .* 'asyncshard\[cache\]'"):
        asyncshard.AsyncShardLoader(cache_dir="cache")


async def test_torch_tensors_without_torch_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await asyncshard.save_sharded_state({"w": np.ones(3)}, tmp_path, rank=0)
    lack(monkeypatch, "torch")
    with pytest.raises(ImportError, match=r"framework='pt': torch is not .* 'asyncshard\[torch\]'"):
        await asyncshard.load(tmp_path, framework="pt")


@pytest.mark.parametrize(("example", "package"), [("demo", "tqdm"), ("demo", "aiobotocore"), ("serve", "uvicorn")])
def test_an_example_without_its_packages_says_what_to_install(example: str, package: str) -> None:
    code = f"import sys, runpy; sys.modules[{package!r}] = None; runpy.run_path('examples/{example}.py')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(rf"{package}[\w.]* is not installed: .*pip install 'asyncshard\[{example}\]'\n", done.stderr)


def test_nothing_that_is_imported_with_the_package_needs_an_extra() -> None:
    code = "import sys, asyncshard, asyncshard.stores, asyncshard.testing; print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    optional = set().union(*map(packages_of, EXTRAS.keys() - {"test"}))
    assert not optional & set(ast.literal_eval(done.stdout))
