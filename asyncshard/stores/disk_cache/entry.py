"""The file of one cached object.

    header      magic, format version, block size, object's size, key of the object, serial of this file; its own digest
    map         a digest of 16 bytes for each block, all zero for one that is absent
    padding     to a multiple of 4,096
    blocks      where they stand in the object, sparse

A block's data is written before its digest. If the writer dies between the two, or the machine fails when its disk has
the digest and not the data, the block is absent or does not match: nothing needs to be synced. A digest is the
XXH3 of 128 bits, seeded with the number of the block; a digest of zero is stored as 1. All of it little-endian.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import xxhash

from asyncshard._core import StopFlag, read_vectors

BLOCK_BYTES = 1 << 20
KEY_BYTES = 32
SERIAL_BYTES = 16
DIGEST_BYTES = 16
ABSENT = bytes(DIGEST_BYTES)
_MAGIC = b"ashard\r\n"
_VERSION = 1
_HEADER = struct.Struct(f"<8sIIQ{KEY_BYTES}s{SERIAL_BYTES}s")
_MAP_START = 128
_PAGE = 4096


class CorruptEntryError(Exception):
    """A file is not a valid entry; the message says why.

    `inode` is that of the file: another file may stand in its place by now.
    """

    def __init__(self, message: str, inode: int) -> None:
        super().__init__(message)
        self.inode = inode


class Layout(NamedTuple):
    """The position of each block in its object and in the entry."""

    size: int
    """Bytes of the object."""

    @property
    def block_count(self) -> int:
        """Blocks of the object; the last one may be shorter."""
        return -(-self.size // BLOCK_BYTES)

    @property
    def blocks_start(self) -> int:
        """Offset of the first block in the entry's file."""
        return -(-(_MAP_START + DIGEST_BYTES * self.block_count) // _PAGE) * _PAGE

    def blocks_of(self, start: int, stop: int) -> range:
        """Return the blocks that hold the bytes [start, stop) of the object."""
        return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))

    def span(self, block: int) -> tuple[int, int]:
        """Return the half-open range of the object's bytes that a block holds."""
        return block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self.size)


def digest_of(block: int, views: Iterable[memoryview]) -> bytes:
    """Return the digest of a block, whose bytes may lie in several pieces of memory."""
    digest = xxhash.xxh3_128(seed=block)
    for view in views:
        digest.update(view)
    return digest.digest() if digest.intdigest() else b"\1".rjust(DIGEST_BYTES, b"\0")


class Entry:
    """An open entry: a context manager. Its methods block, and may be called in several threads at once."""

    def __init__(self, path: str, fd: int, layout: Layout, serial: bytes) -> None:
        self.path = path
        self.layout = layout
        self.serial = serial
        """Random bytes that differ for every file that ever stands at this path."""
        self._fd = fd

    @classmethod
    def open(cls, path: str, key: bytes, size: int, *, is_writable: bool = False) -> Self:
        """Open the entry of an object.

        Raises
        ------
        CorruptEntryError
            The file is no entry, or the entry of another object.
        OSError
            FileNotFoundError if there is no entry.
        """
        fd = _open(path, os.O_RDWR if is_writable else os.O_RDONLY)
        try:
            stored_key, stored_size, serial = _read_header(fd)
            if (stored_key, stored_size) != (key, size):
                raise _corrupt(fd, "its header is that of another object")
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, Layout(size), serial)

    @classmethod
    def open_any(cls, path: str) -> Self:
        """Open the entry of whichever object; the file's name must be that of its key. It raises what `open` does."""
        fd = _open(path, os.O_RDONLY)
        try:
            key, size, serial = _read_header(fd)
            if os.path.basename(path) != name_of(key):
                raise _corrupt(fd, "its header is that of another object")
        except BaseException:
            os.close(fd)
            raise
        return cls(path, fd, Layout(size), serial)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)

    def corrupt(self, message: str) -> CorruptEntryError:
        """Return the error for this entry, with a message that says what is wrong."""
        return _corrupt(self._fd, message)

    def digests(self, blocks: range) -> list[bytes]:
        """Return the stored digest of each block, `ABSENT` for a block that is not there."""
        wanted = DIGEST_BYTES * len(blocks)
        table = os.pread(self._fd, wanted, _MAP_START + DIGEST_BYTES * blocks.start)
        if len(table) != wanted:
            raise self.corrupt("it ends within its map")
        return [table[at : at + DIGEST_BYTES] for at in range(0, wanted, DIGEST_BYTES)]

    def read(self, start: int, views: Sequence[memoryview], stop: StopFlag) -> None:
        """Fill memory with the object's bytes from `start` on, unless told to stop. Digests are not compared."""
        wanted = sum(view.nbytes for view in views)
        count, number = read_vectors(self._fd, self.layout.blocks_start + start, views, stop)
        if number:
            raise OSError(number, os.strerror(number), self.path)
        if count != wanted and not stop.is_set():
            raise self.corrupt(f"it ends at byte {start + count:,} of the object")

    def write(self, block: int, data: memoryview) -> None:
        """Write a block, then its digest."""
        start, stop = self.layout.span(block)
        assert data.nbytes == stop - start
        _write_all(self._fd, data, self.layout.blocks_start + start)
        _write_all(self._fd, memoryview(digest_of(block, [data])), _MAP_START + DIGEST_BYTES * block)


def name_of(key: bytes) -> str:
    """Return the name of an entry's file. Nothing of the object's own name is in it."""
    return f"{key.hex()}.blocks"


def create(path: str, key: bytes, size: int) -> None:
    """Make an entry without blocks. If another process has made it meanwhile, that one stays.

    Raises
    ------
    OSError
    """
    layout = Layout(size)
    serial = os.urandom(SERIAL_BYTES)
    header = _HEADER.pack(_MAGIC, _VERSION, BLOCK_BYTES, size, key, serial)
    temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}{serial.hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            _write_all(fd, memoryview(header + xxhash.xxh3_128_digest(header)), 0)
            os.ftruncate(fd, layout.blocks_start + size)
        finally:
            os.close(fd)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


TEMPORARY = "new-"
"""Beginning of the name of a file that is to become an entry."""


def _open(path: str, mode: int) -> int:
    """Open a regular file. Anything else is a wrong entry at once: opening a FIFO must not wait for its other end."""
    try:
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a socket or FIFO, a folder
            raise
        raise CorruptEntryError("it is no regular file", os.lstat(path).st_ino) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _corrupt(fd, "it is no regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _corrupt(fd: int, message: str) -> CorruptEntryError:
    return CorruptEntryError(message, os.fstat(fd).st_ino)


def _read_header(fd: int) -> tuple[bytes, int, bytes]:
    """Return key, size and serial of an open entry."""
    stored = os.pread(fd, _HEADER.size + DIGEST_BYTES, 0)
    header = stored[: _HEADER.size]
    if len(stored) != _HEADER.size + DIGEST_BYTES or not stored.startswith(_MAGIC):
        raise _corrupt(fd, "it does not begin with the header of an entry")
    _, version, block_bytes, size, key, serial = _HEADER.unpack(header)
    if version != _VERSION:
        raise _corrupt(fd, f"its format is version {version}, not {_VERSION}")
    if xxhash.xxh3_128_digest(header) != stored[_HEADER.size :] or block_bytes != BLOCK_BYTES:
        raise _corrupt(fd, "its header does not match its digest")
    nbytes, expected = os.fstat(fd).st_size, Layout(size).blocks_start + size
    if nbytes != expected:
        raise _corrupt(fd, f"it has {nbytes:,} bytes, not {expected:,}")
    return key, size, serial


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data = data[count:]
        offset += count
