"""The directory that a reshard writes: nothing has its final name before all of it is on the disk.

Files are written in a hidden folder within the directory, flushed, and moved into place at the end. Meanwhile a marker,
`INCOMPLETE_NAME`, tells readers that the directory is no checkpoint; where one is overwritten, from the moment when its
files begin to go. The marker is removed last. All of this blocks: call it in threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

from asyncshard._core import StopFlag
from asyncshard.errors import CheckpointError, FormatError, StoreError, TargetExistsError
from asyncshard.format.index import MAX_INDEX_BYTES, parse_index
from asyncshard.format.pattern import DEFAULT_TEMPLATE, PP_TEMPLATE, ShardPattern
from asyncshard.plan.files.layout import INCOMPLETE_NAME, INDEX_NAME, SINGLE_NAME
from asyncshard.plan.text import enumerate_names
from asyncshard.stores.local.files import translate, translated

_FOLDER = ".asyncshard-reshard"
_LOCK = "lock"
_HUGGING_FACE = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_MOST_VECTORS = 1024
_LARGE = 256 << 10


class Target:
    """A directory to be written.

    Parameters
    ----------
    directory : str
    pattern : ShardPattern, optional
        Names of rank shards, beside the default ones, which `overwrite` replaces.
    overwrite : bool
    """

    def __init__(self, directory: str, pattern: ShardPattern | None, *, overwrite: bool) -> None:
        self.directory = os.path.abspath(directory)
        self._patterns = [*([] if pattern is None else [pattern]), ShardPattern(DEFAULT_TEMPLATE)]
        self._patterns.append(ShardPattern(PP_TEMPLATE))
        self._overwrite = overwrite
        self._folder = os.path.join(self.directory, _FOLDER)
        self._marker = os.path.join(self.directory, INCOMPLETE_NAME)
        self._lock_fd = -1
        self._made_directories: list[str] = []
        """The innermost first."""
        self._made_marker = False
        self._is_committing = False
        self._is_done = False

    def require_other_than(self, source: str) -> None:
        """Raise CheckpointError where the source is this very directory, or in it."""
        folder = source if os.path.isdir(source) else os.path.dirname(source)
        if os.path.realpath(folder) == os.path.realpath(self.directory):
            raise CheckpointError(
                f"{self.directory}: source and target are the same directory; reshard into another one",
                path=self.directory,
            )

    def check(self) -> None:
        """Raise TargetExistsError where there is something that may not be replaced."""
        with translated(self.directory):
            try:
                names = os.listdir(self.directory)
            except FileNotFoundError:
                if os.path.islink(self.directory):
                    raise
                return
            except NotADirectoryError:
                raise TargetExistsError(
                    f"{self.directory}: the target, or a folder above it, is a file; name a directory",
                    path=self.directory,
                    errno=errno.ENOTDIR,
                ) from None
        if INCOMPLETE_NAME in names or self._overwrite:
            return
        others = sorted(name for name in names if name != _FOLDER)
        if others:
            listed = enumerate_names(others, limit=5)
            raise TargetExistsError(
                f"{self.directory}: the target is not empty, it holds {listed}; pass overwrite=True to replace the "
                "weights there, or name another directory",
                path=self.directory,
                errno=errno.EEXIST,
            )

    def begin(self, names: Iterable[str]) -> None:
        """Make the directory, take its lock, remove what a killed run left; `names` are the files to come.

        Raises
        ------
        TargetExistsError, StoreError
        """
        with translated(self.directory):
            self._make_directories()
            self._take_lock()
            self.check()
            self._require_no_folders(names)
            for name in os.listdir(self._folder):
                if name != _LOCK:
                    os.unlink(os.path.join(self._folder, name))
            is_empty = set(os.listdir(self.directory)) == {_FOLDER}
            if is_empty:
                self._mark()

    def _make_directories(self) -> None:
        path = self.directory
        while not os.path.isdir(path):
            self._made_directories.append(path)
            path = os.path.dirname(path)
        os.makedirs(self.directory, exist_ok=True)

    def _take_lock(self) -> None:
        path = os.path.join(self._folder, _LOCK)
        while self._lock_fd < 0:
            with contextlib.suppress(FileNotFoundError):  # a run has ended, and removed the folder
                os.makedirs(self._folder, exist_ok=True)
                if os.path.islink(self._folder):
                    raise StoreError(f"{self._folder}: this link is none of ours; remove it", path=self._folder)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        self._lock_fd = fd
                except BlockingIOError:
                    raise StoreError(
                        f"{self.directory}: another reshard is writing there; wait for it to end", path=self.directory
                    ) from None
                finally:
                    if self._lock_fd < 0:
                        os.close(fd)

    def _require_no_folders(self, names: Iterable[str]) -> None:
        """Raise TargetExistsError where a folder has the name of a file that is to be written or replaced."""
        wanted = {*names, INDEX_NAME}
        for name in os.listdir(self.directory):
            path = os.path.join(self.directory, name)
            if (name in wanted or self._is_weights(name)) and stat.S_ISDIR(os.lstat(path).st_mode):
                raise TargetExistsError(
                    f"{path}: this is a folder, and a file of that name is to be written or replaced; remove it",
                    path=path,
                    errno=errno.EISDIR,
                )

    def _mark(self) -> None:
        if not os.path.lexists(self._marker):
            self._made_marker = True
            with open(self._marker, "x") as file:
                file.write("A reshard has not ended: this is no whole checkpoint. Run it again.\n")
                file.flush()
                os.fsync(file.fileno())
            _flush(self.directory)

    def path_of(self, name: str) -> str:
        """Return where a file is until it gets its name."""
        return os.path.join(self._folder, name)

    def write(self, name: str, start: int, buffers: Sequence[memoryview], stop: StopFlag) -> int:
        """Write buffers one after the other from `start` on; return the bytes written, less only after `stop`."""
        path = self.path_of(name)
        pending = [buffer for buffer in buffers if buffer.nbytes]
        written = 0
        with translated(path):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while pending and not stop.is_set():
                    count = os.pwritev(fd, pending[:_MOST_VECTORS], start + written)
                    written += count
                    while count:
                        if count < len(pending[0]):
                            pending[0] = pending[0][count:]
                            break
                        count -= len(pending.pop(0))
                if written >= _LARGE and hasattr(os, "posix_fadvise"):
                    # The disk begins now, and `flush` has little left to wait for, which no cancel could end sooner.
                    os.posix_fadvise(fd, start, written, os.POSIX_FADV_DONTNEED)
            except OSError as error:
                raise translate(error, path, start=start + written) from error
            finally:
                os.close(fd)
        return written

    def write_text(self, name: str, pieces: Iterable[str]) -> int:
        """Write a text file piece by piece; return its bytes."""
        path = self.path_of(name)
        with translated(path), open(path, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            return os.fstat(file.fileno()).st_size

    def flush(self, name: str) -> None:
        """Bring a file onto the disk."""
        with translated(self.path_of(name)):
            _flush(self.path_of(name))

    def commit(self, names: Sequence[str]) -> None:
        """Give the files their names, in this order; remove the weights that were there before."""
        with translated(self.directory):
            _flush(self._folder)
            old_weights = self._old_weights()
            self._mark()
            self._is_committing = True
            for name in old_weights:
                os.unlink(os.path.join(self.directory, name))
            for name in names:
                os.replace(self.path_of(name), os.path.join(self.directory, name))
            _flush(self.directory)
            os.unlink(self._marker)
            _flush(self.directory)
            self._is_done = True

    def _old_weights(self) -> list[str]:
        """Return the weights' files, the index first."""
        names = os.listdir(self.directory)
        old = [name for name in names if self._is_weights(name)]
        if INDEX_NAME in names:
            old.insert(0, INDEX_NAME)
            with contextlib.suppress(OSError, FormatError):
                with open(os.path.join(self.directory, INDEX_NAME), "rb") as file:
                    named = parse_index(file.read(MAX_INDEX_BYTES), path=None).files
                old += sorted(name for name in set(named) & set(names) - set(old) if name.endswith(".safetensors"))
        return old

    def _is_weights(self, name: str) -> bool:
        if name == SINGLE_NAME or _HUGGING_FACE.fullmatch(name):
            return True
        return any(pattern.parse(name) is not None for pattern in self._patterns)

    def clean_up(self) -> None:
        """Remove what is not in its place; after a failure leave the directory as it was, where that can be."""
        is_undone = not self._is_done and not self._is_committing
        if self._lock_fd >= 0:
            if is_undone and self._made_marker:
                with contextlib.suppress(OSError):
                    os.unlink(self._marker)
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1
        if is_undone:
            with contextlib.suppress(OSError):
                for path in self._made_directories:
                    os.rmdir(path)


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def index_text(total_size: int, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the text of an ``index.json`` in pieces, from the bytes of all tensors and (tensor, file) pairs."""
    yield '{\n  "metadata": {\n    "total_size": ' + str(total_size) + '\n  },\n  "weight_map": {'
    quote: Callable[[str], str] = json.dumps
    separator = "\n"
    for name, file in entries:
        yield f"{separator}    {quote(name)}: {quote(file)}"
        separator = ",\n"
    yield "\n  }\n}\n"
