"""How much memory this process may still take, by the limits of its control groups and the machine's free memory.

Sources: the kernel's documentation of cgroup v2 (``memory.max``, ``memory.current``, ``memory.stat``) and of cgroup v1
(``memory.limit_in_bytes``, ``memory.usage_in_bytes``). Inactive page cache counts as free: the kernel drops it before
it kills a process.
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_BUDGET_MB = 2048
"""A budget whose size nobody chose has 2,048 MiB at most."""
_MIB = 1 << 20


def default_budget_mb(root: Path = Path("/")) -> float:
    """Return the default size of a budget in MiB: 2,048, or a quarter of the free memory if that is less; at least 1.

    Parameters
    ----------
    root : Path
        The directory that contains ``proc`` and ``sys``; tests pass another one.
    """
    free = free_bytes(root)
    if free is None:
        return DEFAULT_BUDGET_MB
    return max(min(DEFAULT_BUDGET_MB, free // 4 // _MIB), 1)


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return how many bytes this process may still take; None if the system does not tell."""
    free = [*_group_free_bytes(root), *_fields(root / "proc/meminfo", {"MemAvailable:": 1024}).values()]
    return max(min(free), 0) if free else None


def _group_free_bytes(root: Path) -> list[int]:
    """Return for each control group that contains this process, and has a limit, the bytes below that limit."""
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
        # In a container the root of the mount may be the group itself. Folders that do not exist are passed over.
        for folder in {root / mount, *(root / mount / parent for parent in (group, *group.parents))}:
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                cache = _fields(folder / "memory.stat", {inactive: 1}).get(inactive, 0)
                free.append(int(most) - int(used) + cache)
    return free


def _fields(path: Path, units: dict[str, int]) -> dict[str, int]:
    """Read the lines ``name value`` of a file. `units` has the wanted names, and for each the bytes of one unit."""
    lines = (line.split() for line in _text(path).splitlines())
    return {line[0]: int(line[1]) * units[line[0]] for line in lines if len(line) > 1 and line[0] in units}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
