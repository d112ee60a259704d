"""Files that are opened, identified and kept within a directory: the local store's work in its threads."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from asyncshard.errors import (
    AccessDeniedError,
    NotRegularFileError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreTimeoutError,
)


class FileVersion(NamedTuple):
    """Identity of a file, which differs for its replacement and after a change."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    """Time of the inode's last change; a rename over the file or its removal changes it, as both drop a link."""


def version_of(status: os.stat_result) -> FileVersion:
    """Return the identity of a file from its ``stat`` result."""
    return FileVersion(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def require_regular(status: os.stat_result, path: str) -> None:
    """Raise NotRegularFileError for anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "not a file")
        raise NotRegularFileError(f"{path}: this is {kind}, not a regular file", path=path)


def open_regular(path: str) -> int:
    """Open a regular file for reading. A FIFO or device is an error at once: opening it must not wait."""
    with translated(path):
        require_regular(os.stat(path), path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        require_regular(os.fstat(fd), path)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise translate(error, path) from error


def translate(error: OSError, path: str, *, start: int | None = None, stop: int | None = None) -> StoreError:
    """Return the StoreError for an OSError on `path`."""
    number = error.errno
    kind: type[StoreError] = StoreError
    text = error.strerror or str(error)
    if number == errno.ENOENT and os.path.islink(path):
        kind, text = ObjectNotFoundError, "the symbolic link points to nothing"
    elif number in (errno.ENOENT, errno.ENOTDIR):
        kind, text = ObjectNotFoundError, "no such file or directory"
    elif number == errno.ELOOP:
        text = "the symbolic links form a loop"
    elif number in (errno.EACCES, errno.EPERM):
        kind, text = AccessDeniedError, "permission denied: check the mode of the file and of the folders above it"
    elif number in (errno.EMFILE, errno.ENFILE):
        text = f"{text}: raise the limit on open files (ulimit -n)"
    else:
        if number == errno.ETIMEDOUT:  # a network file system gave up
            kind = StoreTimeoutError
        if start is not None:
            text = f"{text} at offset {start:,}"
    return kind(f"{path}: {text}", path=path, start=start, stop=stop, errno=number)


def confine(root: str, name: str, *, allow_symlinks: bool) -> str:
    """Return the path below `root` of a name that came out of a listing or an index.

    A symbolic link is followed only where it stays inside the root, or, in the Hugging Face cache, leads from
    ``snapshots/<revision>`` to ``blobs`` beside it.

    Raises
    ------
    AccessDeniedError
        The name leads elsewhere.
    """
    path = os.path.join(root, name)
    if allow_symlinks:
        return path
    real_root, real = os.path.realpath(root), os.path.realpath(path)
    allowed = [real_root]
    snapshots = os.path.dirname(real_root)
    if os.path.basename(snapshots) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    if not any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in allowed):
        raise AccessDeniedError(
            f"{path}: the symbolic link leads outside the checkpoint's directory, to {real}; "
            "if that is meant, pass storage_options={'allow_symlinks': True}",
            path=path,
        )
    return path


class OpenFiles:
    """A few file descriptors that stay open between reads; the least recently used are closed first. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._idle: OrderedDict[tuple[str, FileVersion], list[int]] = OrderedDict()
        self._is_closed = False

    @contextmanager
    def borrow(self, path: str, version: FileVersion) -> Iterator[int]:
        """Lend a descriptor of the file at `path`, which must still be the file of this version.

        Raises
        ------
        ObjectChangedError
            Another file stands there now.
        """
        with self._lock:
            spare = self._idle.pop((path, version), [])
            fd = spare.pop() if spare else -1
            if spare:
                self._idle[path, version] = spare
        if fd < 0:
            fd = open_regular(path)
        try:
            require_unchanged(fd, path, version)
            yield fd
        except BaseException:
            os.close(fd)
            raise
        self.keep(fd, path, version)

    def keep(self, fd: int, path: str, version: FileVersion) -> None:
        """Take a descriptor over: it is lent later, or closed once there are too many."""
        surplus = []
        with self._lock:
            self._idle.setdefault((path, version), []).append(fd)
            self._idle.move_to_end((path, version))
            while self._is_closed or sum(map(len, self._idle.values())) > self._limit:
                if not self._idle:
                    break
                key = next(iter(self._idle))
                surplus.append(self._idle[key].pop())
                if not self._idle[key]:
                    del self._idle[key]
        for other in surplus:
            os.close(other)

    def close(self) -> None:
        """Close all descriptors; one that is lent is closed when it comes back."""
        with self._lock:
            self._is_closed = True
            spare = [fd for fds in self._idle.values() for fd in fds]
            self._idle.clear()
        for fd in spare:
            os.close(fd)


def require_unchanged(fd: int, path: str, version: FileVersion) -> None:
    """Raise ObjectChangedError unless the open file still has the version."""
    with translated(path):
        now = version_of(os.fstat(fd))
    if now != version:
        what = "was replaced" if now[:2] != version[:2] else "was changed, replaced or removed"
        if now[:2] == version[:2] and now.size != version.size:
            what = f"changed in size from {version.size:,} to {now.size:,} bytes"
        raise ObjectChangedError(f"{path}: the file {what} while it was being loaded; load it again", path=path)
