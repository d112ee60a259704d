"""The directory of a cache: its entries by key, this process's knowledge of them, and the bytes they may take.

    entries/    a file for each object: see `entry`
    locks/      the files of the locks: see `locks`

Both are readable by their owner alone, and nothing of an object's name is in a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator

import filelock

from asyncshard.stores.disk_cache import entry, eviction
from asyncshard.stores.disk_cache.entry import BLOCK_BYTES, CorruptEntryError, Entry

logger = logging.getLogger("asyncshard")


class DiskCache:
    """Objects of other stores on this machine's disk, shared by its processes. Making a `DiskCache` does no I/O.

    It holds no file and no thread open, and may be used by several stores, loops and threads at once. All methods that
    touch the disk block, and raise OSError where the disk fails.

    Parameters
    ----------
    directory : str or path
        Where the entries are. It is made, for its owner alone, if it does not exist.
    max_bytes : int
        Bytes that entries may take, about: those of objects that are being loaded are not evicted for it.
    lock_timeout_s : float
        Seconds in which nobody writes to an entry, after which a load no longer waits for what others fetch.
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_bytes: int, lock_timeout_s: float = 30.0) -> None:
        self.directory = os.path.abspath(directory)
        self.entries = os.path.join(self.directory, "entries")
        self.locks = os.path.join(self.directory, "locks")
        self.max_bytes = max_bytes
        self.lock_timeout_s = lock_timeout_s
        self._step = max(max_bytes // 64, BLOCK_BYTES)
        """Bytes written by this process after which it looks whether all entries together take too many."""
        self._lock = threading.Lock()
        self._written = self._step  # so that the first write looks
        """Bytes written since this process last looked."""
        self._has_room = True
        """Whether there was room when this process last looked."""
        self._evicting = threading.Lock()
        self._in_use: Counter[bytes] = Counter()
        self._checked: dict[bytes, tuple[bytes, bytearray]] = {}
        """By key: the serial of the entry, and a flag a block, whether this process has compared it with its digest."""
        self._ignored: set[bytes] = set()
        """Keys of entries that are wrong and cannot be removed."""
        self._has_warned = False

    def prepare(self) -> None:
        """Make the directories.

        Raises
        ------
        OSError
            Also PermissionError, if others may write there: a file of theirs would be loaded.
        """
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        for path in (self.entries, self.locks):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            status = os.lstat(path)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
                raise PermissionError(
                    f"{path}: this is no folder of this user's own, or others may write there; use another cache_dir"
                )

    def path_of(self, key: bytes) -> str:
        """Return the path of an object's entry."""
        return os.path.join(self.entries, entry.name_of(key))

    def begin_use(self, key: bytes) -> None:
        """Note that an object is being loaded. Its entry counts as used now, and this process does not evict it."""
        with self._lock:
            self._in_use[key] += 1
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(self.path_of(key))

    def end_use(self, keys: Iterable[bytes]) -> None:
        """Note that objects are no longer being loaded."""
        with self._lock:
            self._in_use.subtract(keys)
            self._in_use += Counter()  # drops those at zero

    def can_keep(self, key: bytes) -> bool:
        """Return whether blocks of an object can be kept: not if its entry is wrong and cannot be removed."""
        return key not in self._ignored

    def changed_ns(self, key: bytes) -> int:
        """Return the time at which an object's entry was last written, by any process; 0 if there is no entry."""
        try:
            return os.stat(self.path_of(key)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def open(self, key: bytes, size: int) -> Entry | None:
        """Open an object's entry for reading; None if there is no entry.

        Raises
        ------
        CorruptEntryError
        """
        if key in self._ignored:
            return None
        try:
            return Entry.open(self.path_of(key), key, size)
        except FileNotFoundError:
            return None

    def open_or_create(self, key: bytes, size: int) -> Entry:
        """Open an object's entry for writing, a new one if there is none.

        Raises
        ------
        CorruptEntryError
        """
        path = self.path_of(key)
        try:
            return Entry.open(path, key, size, is_writable=True)
        except FileNotFoundError:
            entry.create(path, key, size)
            return Entry.open(path, key, size, is_writable=True)

    def drop(self, key: bytes, name: str, error: CorruptEntryError) -> None:
        """Remove an entry that is wrong, with a warning that has the object's name.

        An entry that stands in its place by now is left alone.
        """
        with self._lock:
            self._checked.pop(key, None)
            if key not in self._ignored and not self.discard(self.path_of(key), name, error):
                self._ignored.add(key)

    def discard(self, path: str, name: str, error: CorruptEntryError) -> bool:
        """Remove the file of an entry that is wrong, with a warning. Return False if it cannot be removed."""
        try:
            if os.lstat(path).st_ino != error.inode:
                return True
        except FileNotFoundError:
            return True
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as failure:
            logger.warning(
                "%s: its entry in the cache, %s, is wrong and cannot be removed (%s); remove it: %s",
                name,
                path,
                failure.strerror,
                error,
            )
            return False
        logger.warning("%s: its entry in the cache, %s, is dropped and fetched again: %s", name, path, error)
        return True

    def checked(self, key: bytes, opened: Entry) -> bytearray:
        """Return a flag for each block of an entry: whether this process has compared it with its digest."""
        with self._lock:
            serial, flags = self._checked.get(key, (b"", bytearray()))
            if serial != opened.serial:
                flags = bytearray(opened.layout.block_count)
                self._checked[key] = opened.serial, flags
            return flags

    def has_room_for(self, nbytes: int) -> bool:
        """Count bytes that are about to be written, and evict from time to time. Return False if there is no room."""
        with self._evicting:
            self._written += nbytes
            if self._written >= self._step or not self._has_room:
                self._written = 0
                self._has_room = self.make_room(nbytes)
            return self._has_room

    def make_room(self, nbytes: int) -> bool:
        """Evict the entries that were used longest ago, until there is room for `nbytes` more.

        There is then also room for all bytes until this process looks again. Return False if the entries that this
        process is using leave no room.
        """
        with self._lock:
            in_use = {entry.name_of(key) for key in self._in_use}
        lock = filelock.FileLock(os.path.join(self.locks, "eviction"), mode=0o600, thread_local=False)
        with _held(lock) as is_held:
            if not is_held:  # another process is at it
                return True
            most = max(self.max_bytes - self._step - nbytes, 0)
            return eviction.make_room(self.entries, most, in_use) <= most

    def warn_once(self, reason: object) -> None:
        """Warn that loads go on without the cache; only the first call does."""
        with self._lock:
            if self._has_warned:
                return
            self._has_warned = True
        logger.warning("%s: the load goes on without the cache: %s", self.directory, reason)


def key_of(identity: str) -> bytes:
    """Return the key of an object from its `Store.identity`."""
    return hashlib.sha256(identity.encode()).digest()


@contextlib.contextmanager
def _held(lock: filelock.BaseFileLock) -> Iterator[bool]:
    """Hold a file lock if nobody else does; yield whether it is held."""
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
