"""Files that get their names in a directory all at once, or none: `reshard` and `save_sharded_state` write so.

They are written in a hidden folder within the directory, whose lock keeps other writers out, and flushed. The commit

1. puts the mark into the directory, by which readers refuse what is there; it lists the files that come and go;
2. moves the files that go aside, into the hidden folder;
3. gives the new files their names;
4. takes the mark away, and only then removes what it has moved aside.

A failure within 2 and 3 is undone. A kill there leaves the mark, and all files on the disk: `resume` ends such a
commit. One new file, over none or over one of its own name, needs no mark: its one rename is the commit. All of this
blocks: call it in threads.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asyncshard.errors import StoreError, TargetExistsError
from asyncshard.pipeline.writing.commit import Commit, flush, folders_of, is_folder, write_mark
from asyncshard.stores.local.files import translated
from asyncshard.tasks.exit_gate import EXIT_GATE

_LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""From file systems without locks, as Lustre may be mounted."""


class Role(NamedTuple):
    """Who writes, in names and words."""

    folder: str
    """Name of the hidden folder."""
    mark: str
    """Name of the mark."""
    note: str
    """The text of the mark, for a person who finds it."""
    busy: str
    """The error's text after the directory's path, where another writer holds the lock."""


class DirectoryWriter:
    """Writes files into a directory: `begin`, then write to `path_of`, `flush`, `commit`; `clean_up` in any case.

    Parameters
    ----------
    directory : str
        Made if it does not exist.
    role : Role
    requires_lock : bool
        Whether a file system without locks is an error; otherwise callers keep apart who writes there at once.
    """

    def __init__(self, directory: str, role: Role, *, requires_lock: bool = True) -> None:
        self.directory = os.path.abspath(directory)
        self.id = secrets.token_hex(16)
        """The id of this writer, and of no other."""
        self._role = role
        self._requires_lock = requires_lock
        self._folder = os.path.join(self.directory, role.folder)
        self._mark = os.path.join(self.directory, role.mark)
        self._staged, _ = folders_of(self._folder, self.id)
        self._lock_fd = -1
        self._is_locked = False
        self._made_directories: list[str] = []
        """The innermost first."""
        self._made_mark = False
        self._moves: list[tuple[str, str]] = []
        """The renames of the commit so far, in order: old and new path."""
        self._is_done = False

    def begin(self) -> None:
        """Make the directory and the hidden folder, and take its lock.

        Raises
        ------
        StoreError
            Another one holds it (this is retryable), or the directory cannot be written to.
        """
        with translated(self.directory):
            path = self.directory
            while not os.path.isdir(path):
                self._made_directories.append(path)
                path = os.path.dirname(path)
            os.makedirs(self.directory, exist_ok=True)
            self._take_lock()
            os.makedirs(self._staged)

    def _take_lock(self) -> None:
        path = os.path.join(self._folder, _LOCK)
        while self._lock_fd < 0:
            with contextlib.suppress(FileNotFoundError):  # another one has ended, and removed the folder
                os.makedirs(self._folder, exist_ok=True)
                if os.path.islink(self._folder):
                    raise StoreError(f"{self._folder}: this link is none of ours; remove it", path=self._folder)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                try:
                    self._is_locked = self._lock(fd)
                    if os.path.samestat(os.fstat(fd), os.stat(path)):
                        self._lock_fd = fd
                finally:
                    if self._lock_fd < 0:
                        os.close(fd)

    def _lock(self, fd: int) -> bool:
        """Lock a file; return False where the file system has no locks and none is required."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            error = StoreError(f"{self.directory}: {self._role.busy}", path=self.directory, errno=errno.EAGAIN)
            error.retryable = True
            raise error from None
        except OSError as error:
            if self._requires_lock or error.errno not in _NO_LOCKS:
                raise
            return False
        return True

    def remove_leftovers(self) -> None:
        """Remove what killed writers left in the hidden folder; without a lock nobody can tell, and it stays."""
        with translated(self._folder):
            for name in os.listdir(self._folder) if self._is_locked else ():
                if name not in (_LOCK, self.id):
                    _remove(os.path.join(self._folder, name))

    def require_no_folders(self, names: Iterable[str]) -> None:
        """Raise TargetExistsError where a folder has the name of a file that is to be written or replaced."""
        for name in names:
            path = os.path.join(self.directory, name)
            if is_folder(path):
                raise TargetExistsError(
                    f"{path}: this is a folder, and a file of that name is to be written or replaced; remove it",
                    path=path,
                    errno=errno.EISDIR,
                )

    def path_of(self, name: str) -> str:
        """Return where a file is until it gets its name."""
        return os.path.join(self._staged, name)

    def flush(self, name: str) -> None:
        """Bring a file onto the disk."""
        with translated(os.path.join(self.directory, name)):
            flush(self.path_of(name))

    def mark(self, names: Sequence[str] = (), going: Sequence[str] = ()) -> None:
        """Put the mark into the directory, and onto the disk."""
        path = self.path_of(self._role.mark)
        with translated(self._mark):
            write_mark(path, self._role.note, self.id, names, going)
            self._made_mark = self._made_mark or not os.path.lexists(self._mark)
            os.replace(path, self._mark)
            flush(self.directory)

    def commit(self, names: Sequence[str], replaced: Iterable[str]) -> None:
        """Give the files their names, in this order, in place of those that are called so and of `replaced`.

        The end of the interpreter waits for it.
        """
        with EXIT_GATE, translated(self.directory):
            self.require_no_folders(names)
            present = set(os.listdir(self.directory))
            going = [name for name in dict.fromkeys((*replaced, *names)) if name in present]
            if len(names) == 1 and set(going) <= set(names) and self._role.mark not in present:
                os.replace(self.path_of(names[0]), os.path.join(self.directory, names[0]))
                self._is_done = True
                flush(self.directory)
                return
            flush(self._staged)
            flush(self._folder)
            self.mark(names, going)
            try:
                for move in Commit.of(self.directory, self._folder, self.id, names, going).run():
                    self._moves.append(move)
                os.unlink(self._mark)
            except BaseException:
                self._undo()
                raise
            self._is_done = True
            flush(self.directory)

    def _undo(self) -> None:
        """Take the renames back; where that fails too, the mark stays and everything is kept."""
        with contextlib.suppress(OSError):
            while self._moves:
                source, target = self._moves[-1]
                os.replace(target, source)
                self._moves.pop()
            flush(self.directory)

    def resume(self) -> None:
        """End the commit of a writer that was killed within it; without a lock nobody can tell that it was.

        Where files are lacking for that, only the mark of a commit that had not begun is taken away.
        """
        if not self._is_locked or not os.path.lexists(self._mark):
            return
        with EXIT_GATE, translated(self.directory):
            commit = Commit.read(self._mark, self.directory, self._folder)
            if commit is None:
                return
            if commit.can_run:
                for _ in commit.run():
                    pass
            elif commit.has_begun:
                return
            os.unlink(self._mark)
            flush(self.directory)

    def clean_up(self) -> None:
        """Remove what is not in its place; after a failure leave the directory as it was, where that can be."""
        if self._lock_fd >= 0:
            is_stuck = bool(self._moves) and not self._is_done
            if not is_stuck:
                if self._made_mark and not self._is_done:
                    with contextlib.suppress(OSError):
                        os.unlink(self._mark)
                self._remove_folder()
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open too
            os.close(self._lock_fd)
            self._lock_fd = -1
        if not self._is_done:
            with contextlib.suppress(OSError):
                for path in self._made_directories:
                    os.rmdir(path)

    def _remove_folder(self) -> None:
        """Remove the hidden folder, but not what others have there."""
        for path in folders_of(self._folder, self.id):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            is_own = self._is_locked and not os.path.lexists(self._mark)
            if is_own or os.listdir(self._folder) == [_LOCK]:
                shutil.rmtree(self._folder, ignore_errors=True)


def is_held(folder: str) -> bool:
    """Return whether a writer that has a hidden folder is at work in it."""
    try:
        fd = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove(path: str) -> None:
    if is_folder(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)
