"""XXH3 of 128 bits, the digest of tensors: from the package ``xxhash``, which is an extra."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from asyncshard.extras import require

if TYPE_CHECKING:
    from typing_extensions import Buffer

Digest = Callable[["Buffer"], bytes]

_STEP = 1 << 20
"""Bytes hashed at once: a tenth of a millisecond, should the package hold the GIL."""


def load_digest() -> Digest:
    """Return the function from a buffer of bytes to its digest of 16. Slow for large buffers: call it in a thread.

    Raises
    ------
    ImportError
        The package is not installed.
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
