"""The cache's directory: its entries by key, what this process knows of them, and the bytes they may take.

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
    """Objects of other stores on this machine's disk, shared by its processes. Making one does no I/O.

    It holds no file and no thread, and may be used by several stores, loops and threads at once. All methods that
    touch the disk block, and raise OSError where the disk fails.

    Parameters
    ----------
    directory : str or path
        Made, for its owner alone, where it is not there.
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
        """Bytes written by one process after which it looks whether there are too many."""
        self._lock = threading.Lock()
        self._written = self._step  # so that the first write looks
        """Bytes written since the last look."""
        self._has_room = True
        """What the last look found."""
        self._evicting = threading.Lock()
        self._in_use: Counter[bytes] = Counter()
        self._checked: dict[bytes, tuple[bytes, bytearray]] = {}
        """By key: the serial of an entry, and a flag for each of its blocks that this process has compared."""
        self._ignored: set[bytes] = set()
        """Entries that are wrong and cannot be removed."""
        self._has_warned = False

    def prepare(self) -> None:
        """Make the directories.

        Raises
        ------
        OSError
            PermissionError too where others may write there: what they put there would be loaded.
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
        """Note that an object is being loaded: its entry is now the one used last, and this process keeps it."""
        with self._lock:
            self._in_use[key] += 1
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(self.path_of(key))

    def end_use(self, keys: Iterable[bytes]) -> None:
        """Note that objects are loaded."""
        with self._lock:
            self._in_use.subtract(keys)
            self._in_use += Counter()  # drops those at zero

    def can_keep(self, key: bytes) -> bool:
        """Return whether blocks of an object can be written: not where a wrong entry cannot be removed."""
        return key not in self._ignored

    def changed_ns(self, key: bytes) -> int:
        """Return when an object's entry was last written to, by any process; 0 where there is none."""
        try:
            return os.stat(self.path_of(key)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def open(self, key: bytes, size: int) -> Entry | None:
        """Open an entry for reading; None where there is none.

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
        """Open an entry for writing.

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

    def drop(self, key: bytes, what: str, error: CorruptEntryError) -> None:
        """Remove an entry that is wrong, with a warning that names the object.

        It does nothing where another entry stands in its place already.
        """
        with self._lock:
            self._checked.pop(key, None)
            if key not in self._ignored and not self.discard(self.path_of(key), what, error):
                self._ignored.add(key)

    def discard(self, path: str, what: str, error: CorruptEntryError) -> bool:
        """Remove the file of an entry that is wrong, with a warning; False where it cannot be removed."""
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
                what,
                path,
                failure.strerror,
                error,
            )
            return False
        logger.warning("%s: its entry in the cache, %s, is dropped and fetched again: %s", what, path, error)
        return True

    def checked(self, key: bytes, opened: Entry) -> bytearray:
        """Return the flags of an entry's blocks: whether this process has compared each with its digest."""
        with self._lock:
            serial, flags = self._checked.get(key, (b"", bytearray()))
            if serial != opened.serial:
                flags = bytearray(opened.layout.block_count)
                self._checked[key] = opened.serial, flags
            return flags

    def has_room_for(self, nbytes: int) -> bool:
        """Count bytes that are about to be written, and evict from time to time; False where there is no room."""
        with self._evicting:
            self._written += nbytes
            if self._written >= self._step or not self._has_room:
                self._written = 0
                self._has_room = self.make_room(nbytes)
            return self._has_room

    def make_room(self, nbytes: int) -> bool:
        """Evict entries that were used longest ago until there is room for `nbytes` and for what comes before the next
        look; False where those that this process loads take it.
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
        """Say, the first time, that loads go on without the cache."""
        with self._lock:
            if self._has_warned:
                return
            self._has_warned = True
        logger.warning("%s: the load goes on without the cache: %s", self.directory, reason)


def key_of(identity: str) -> bytes:
    """Return the key of an object."""
    return hashlib.sha256(identity.encode()).digest()


@contextlib.contextmanager
def _held(lock: filelock.BaseFileLock) -> Iterator[bool]:
    """Hold a file lock if nobody else does."""
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
