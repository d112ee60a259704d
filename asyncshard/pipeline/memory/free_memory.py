"""How much memory this process may still take: its control group's limits, and the machine's free memory.

Sources: the kernel's cgroup-v2 documentation (``memory.max``, ``memory.current``, ``memory.stat``) and cgroup-v1's
(``memory.limit_in_bytes``, ``memory.usage_in_bytes``). Inactive page cache counts as free, since the kernel drops it
before it kills.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_BUDGET_MB = 2048
_MIB = 1 << 20


def default_budget_mb(root: Path = Path("/")) -> float:
    """Return the smaller of 2048 MiB and a quarter of the memory that is free to the process, at least 1 MiB."""
    free = free_bytes(root)
    if free is None:
        return DEFAULT_BUDGET_MB
    return max(min(DEFAULT_BUDGET_MB, free // 4 // _MIB), 1)


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes free to this process, or None where the system does not say."""
    found = [*_group_free_bytes(root), *_fields(root / "proc/meminfo", {"MemAvailable:": 1024}).values()]
    return max(min(found), 0) if found else None


def _group_free_bytes(root: Path) -> list[int]:
    """What each control group above this process leaves it."""
    free = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "?", "")
        if controllers == "":
            mount, limit, usage, inactive = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, inactive = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        # In a container the mount may show the group itself as its root: what does not exist is passed over.
        for folder in {root / mount, *(root / mount / parent for parent in (group, *group.parents))}:
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                cache = _fields(folder / "memory.stat", {inactive: 1}).get(inactive, 0)
                free.append(int(most) - int(used) + cache)
    return free


def _fields(path: Path, units: dict[str, int]) -> dict[str, int]:
    """Read ``name value`` lines, scaled to bytes."""
    lines = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) * units[line[0]] for line in lines if len(line) > 1 and line[0] in units}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
