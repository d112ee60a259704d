"""The directory that a reshard writes: what may be replaced there, and the bytes of each file.

Where it is new or empty, the mark `INCOMPLETE_NAME` stands in it from the beginning; where it is overwritten, from the
commit on. All of this blocks: call it in threads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from asyncshard._core import StopFlag
from asyncshard.errors import CheckpointError, FormatError, StoreError, TargetExistsError
from asyncshard.format.index import MAX_INDEX_BYTES, parse_index
from asyncshard.format.pattern import DEFAULT_TEMPLATE, PP_TEMPLATE, ShardPattern
from asyncshard.pipeline.writing.directory import DirectoryWriter, Role, is_held
from asyncshard.pipeline.writing.save import is_save_folder
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME, marked_rank
from asyncshard.plan.files.layout import INDEX_NAME, SINGLE_NAME
from asyncshard.plan.text import enumerate_names
from asyncshard.stores.local.files import translate, translated

_ROLE = Role(
    ".asyncshard-reshard",
    INCOMPLETE_NAME,
    "A reshard has not ended: this is no whole checkpoint. Run it again.",
    "another reshard is writing there; wait for it to end",
)
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
        self._writer = DirectoryWriter(directory, _ROLE)
        self.directory = self._writer.directory
        self._patterns = [*([] if pattern is None else [pattern]), ShardPattern(DEFAULT_TEMPLATE)]
        self._patterns.append(ShardPattern(PP_TEMPLATE))
        self._overwrite = overwrite

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
        others = sorted(name for name in names if name != _ROLE.folder)
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
        self._writer.begin()
        with translated(self.directory):
            self.check()
            present = os.listdir(self.directory)
            self._writer.require_no_folders([*names, INDEX_NAME, *filter(self._is_weights, present)])
            for name in filter(is_save_folder, present):
                if is_held(os.path.join(self.directory, name)):
                    raise StoreError(
                        f"{self.directory}: a save is writing there; wait for it to end", path=self.directory
                    )
            self._writer.remove_leftovers()
            if set(present) == {_ROLE.folder}:
                self._writer.mark()

    def write(self, name: str, start: int, buffers: Sequence[memoryview], stop: StopFlag) -> int:
        """Write buffers one after the other from `start` on; return the bytes written, less only after `stop`."""
        path = self._writer.path_of(name)
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
        path = self._writer.path_of(name)
        with translated(path), open(path, "w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            return os.fstat(file.fileno()).st_size

    def flush(self, name: str) -> None:
        """Bring a file onto the disk."""
        self._writer.flush(name)

    def commit(self, names: Sequence[str]) -> None:
        """Give the files their names, in this order, in place of the weights that were there before."""
        with translated(self.directory):
            old_weights = self._old_weights()
        self._writer.commit(names, old_weights)
        for name in filter(is_save_folder, os.listdir(self.directory)):  # of saves that were killed
            shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

    def _old_weights(self) -> list[str]:
        """Return the weights' files, the index first, and the marks of ranks."""
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
        return any(pattern.parse(name) or marked_rank(name, pattern) for pattern in self._patterns)

    def clean_up(self) -> None:
        """Remove what is not in its place; after a failure leave the directory as it was, where that can be."""
        self._writer.clean_up()


def index_text(total_size: int, entries: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the text of an ``index.json`` in pieces, from the bytes of all tensors and (tensor, file) pairs."""
    yield '{\n  "metadata": {\n    "total_size": ' + str(total_size) + '\n  },\n  "weight_map": {'
    quote: Callable[[str], str] = json.dumps
    separator = "\n"
    for name, file in entries:
        yield f"{separator}    {quote(name)}: {quote(file)}"
        separator = ",\n"
    yield "\n  }\n}\n"
