"""The renames by which files get their names in a directory, and the mark that stands there meanwhile.

The mark is one JSON object: a note to whoever finds it, the writer's id, the names of the files that come and of those
that go. It is on the disk before the first rename, and so is all that gets a name: a commit that was killed can be
ended later.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

_MAX_MARK_BYTES = 64 << 20


class Commit(NamedTuple):
    """One commit: files of a staging folder go into a directory, and those that are there go aside."""

    directory: str
    staged: str
    """The folder of the files to come."""
    aside: str
    """The folder of the files that went."""
    names: Sequence[str]
    """The files to come, in the order in which they get their names."""
    going: Sequence[str]
    """The files that go, before any of the others comes."""

    @classmethod
    def of(cls, directory: str, folder: str, writer: str, names: Sequence[str], going: Sequence[str]) -> Self:
        """Return the commit of a writer, by its id; `folder` is the hidden one."""
        staged, aside = folders_of(folder, writer)
        return cls(directory, staged, aside, names, going)

    @classmethod
    def read(cls, mark: str, directory: str, folder: str) -> Self | None:
        """Return the commit of which a mark tells; None where it does not, or does not stand there."""
        try:
            with open(mark, "rb") as file:
                value = json.loads(file.read(_MAX_MARK_BYTES))
            writer, names, going = value["id"], value["files"], value["replaced"]
            is_known = re.fullmatch("[0-9a-f]{32}", writer) is not None and len(names) > 0
            is_known = is_known and all(name and os.path.basename(name) == name for name in (*names, *going))
        except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
            return None
        return cls.of(directory, folder, writer, names, going) if is_known else None

    def run(self) -> Iterable[tuple[str, str]]:
        """Make the renames, but those that are made already, and yield each of them, as (source, target)."""
        os.makedirs(self.aside, exist_ok=True)
        for name in self.going:
            source, target = os.path.join(self.directory, name), os.path.join(self.aside, name)
            if os.path.lexists(source) and not os.path.lexists(target):
                os.replace(source, target)
                yield source, target
        for name in self.names:
            source, target = os.path.join(self.staged, name), os.path.join(self.directory, name)
            if os.path.lexists(source):
                os.replace(source, target)
                yield source, target
        flush(self.directory)

    @property
    def can_run(self) -> bool:
        """Whether every file to come is still there, or has its name already."""
        return all(self._is_there(name) for name in self.names)

    def _is_there(self, name: str) -> bool:
        if os.path.lexists(os.path.join(self.staged, name)):
            return True
        is_new = name not in self.going or os.path.lexists(os.path.join(self.aside, name))
        return is_new and os.path.lexists(os.path.join(self.directory, name))

    @property
    def has_begun(self) -> bool:
        """Whether any file went aside."""
        with contextlib.suppress(FileNotFoundError):
            return bool(os.listdir(self.aside))
        return False


def folders_of(folder: str, writer: str) -> tuple[str, str]:
    """Return where a writer keeps, in the hidden folder, the files to come and those that went."""
    return os.path.join(folder, writer), os.path.join(folder, f"{writer}.old")


def write_mark(path: str, note: str, writer: str, names: Sequence[str], going: Sequence[str]) -> None:
    """Write a mark and bring it onto the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"note": note, "id": writer, "files": [*names], "replaced": [*going]}, file)
        file.flush()
        os.fsync(file.fileno())


def flush(path: str) -> None:
    """Bring a file, or the names in a folder, onto the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_folder(path: str) -> bool:
    """Return whether a folder has this name; a link to one has not."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False
