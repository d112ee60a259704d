"""Digests of the tensors of a file, stored in the ``__metadata__`` of its header.

The value of the key `DIGESTS_KEY` has 32 lower-case hexadecimal digits for each tensor of the file, empty tensors
included, in the order of their file offsets and without separators. The digits of a tensor are the 128-bit XXH3 hash of
its bytes, big-endian. A program that changes tensors and copies the metadata must drop the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from asyncshard.errors import FormatError
from asyncshard.extras import require
from asyncshard.format.header import Header

if TYPE_CHECKING:
    from typing_extensions import Buffer

Digest = Callable[["Buffer"], bytes]
"""A function that takes a buffer and returns the digest of its bytes, 16 bytes long."""

DIGESTS_KEY = "asyncshard.xxh3_128"
"""The key of the digests in the metadata."""
DIGEST_BYTES = 16
"""The 16 bytes of a 128-bit hash."""
DIGITS = 2 * DIGEST_BYTES
"""The 32 hexadecimal digits of a digest."""
_BLOCK = 1 << 18
"""262,144 digits are decoded at a time: NumPy holds the GIL for half a millisecond."""
_STEP = 1 << 20
"""1 MiB is hashed at a time: a tenth of a millisecond, in case xxhash holds the GIL."""
_NO_DIGIT = 16
"""The value of a character that is not a lower-case hexadecimal digit; the digits have the values 0 to 15."""
_VALUES = np.full(256, _NO_DIGIT, np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


def has_digests(header: Header) -> bool:
    """Return whether the metadata of a header has the key of the digests, whatever its value."""
    return DIGESTS_KEY in header.metadata


def digests_of(header: Header, *, path: str | None = None) -> NDArray[np.uint8] | None:
    """Return the digest of each tensor as a row of 16 bytes, in file order; None if the header has no digests.

    This is slow for many tensors: call it in a thread.

    Raises
    ------
    FormatError
        The value of `DIGESTS_KEY` is too long, too short, or has a character that is not a lower-case hexadecimal
        digit.
    """
    text = header.metadata.get(DIGESTS_KEY)
    if text is None:
        return None
    if len(text) != DIGITS * len(header):
        raise _error(
            f"it has {len(text):,} characters, and {len(header):,} tensors need {DIGITS * len(header):,}", path
        )
    if not text.isascii():
        raise _error("it holds characters outside of ASCII", path)
    digits = np.frombuffer(text.encode("ascii"), np.uint8)
    digests = np.empty(len(digits) // 2, np.uint8)
    for start in range(0, len(digits), _BLOCK):
        values = _VALUES[digits[start : start + _BLOCK]]
        if values.max() >= _NO_DIGIT:
            at = start + int(np.argmax(values))
            raise _error(f"its character {at:,}, {text[at]!r}, is no hexadecimal digit in lower case", path)
        digests[start // 2 : (start + _BLOCK) // 2] = values[::2] << 4 | values[1::2]
    return digests.reshape(len(header), DIGEST_BYTES)


def load_digest() -> Digest:
    """Return the function that computes the digest of a buffer. It is slow for large buffers: call it in a thread.

    Raises
    ------
    ImportError
        The package xxhash is not installed.
    """
    require("digests of tensors", "xxhash")
    import xxhash

    make: Any = xxhash.xxh3_128

    def digest(buffer: Buffer) -> bytes:
        state = make()
        with memoryview(buffer) as whole:
            for start in range(0, whole.nbytes, _STEP):
                state.update(whole[start : start + _STEP])
        result: bytes = state.digest()
        return result

    return digest


def _error(problem: str, path: str | None) -> FormatError:
    where = "" if path is None else f"{path}: "
    return FormatError(
        f"{where}the metadata {DIGESTS_KEY!r} does not hold the tensors' digests: {problem}; write the file again, or "
        "without that key",
        path=path,
    )
