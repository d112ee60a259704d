"""The ``model.safetensors.index.json`` of a Hugging Face checkpoint: which file holds each tensor."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from asyncshard._core import WeightMap, parse_weight_map
from asyncshard.errors import FormatError

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_INDEX_BYTES = 100_000_000
"""An index of more than 100 million bytes, about a million tensors, is refused before it is read, as a header is."""

_DRIVE = re.compile(r"[A-Za-z]:")


def parse_index(data: Buffer, *, path: str | None, max_entries: int | None = None) -> WeightMap:
    """Parse an index, and check that every file it names lies in the index's own directory or below it.

    `data` is the whole file; no reference to it is kept. The GIL is released while it is parsed.

    Raises
    ------
    FormatError
        The text is not JSON, has no ``weight_map`` of strings, names a tensor twice or more than `max_entries`, or
        names a file by an absolute path, a drive, ``..``, an empty part, a backslash or a NUL.
    """
    try:
        weight_map = parse_weight_map(data, max_entries=sys.maxsize if max_entries is None else max_entries)
    except FormatError as error:
        raise _error(str(error), path, tensor=error.tensor, offset=error.offset) from None
    for index, file in enumerate(weight_map.files):
        reason = _reason_to_refuse(file)
        if reason is not None:
            tensor = weight_map.first_name(index)
            raise _error(
                f"weight_map maps tensor {tensor[:200]!r} to {file[:200]!r}, which {reason}; "
                "only files in the index's own directory may be named",
                path,
                tensor=tensor,
            )
    return weight_map


def _reason_to_refuse(file: str) -> str | None:
    """Return why a file name may lead out of the directory, or None if it stays inside."""
    if "\0" in file:
        return "holds a NUL"
    if "\\" in file:
        return "holds a backslash"
    if file.startswith("/"):
        return "is an absolute path"
    if _DRIVE.match(file):
        return "begins with a drive letter"
    parts = file.split("/")
    if "" in parts:
        return "is empty or has an empty part"
    if "." in parts or ".." in parts:
        return "has a part that is '.' or '..'"
    return None


def _error(message: str, path: str | None, *, tensor: str | None = None, offset: int | None = None) -> FormatError:
    prefixed = message if path is None else f"{path}: {message}"
    return FormatError(prefixed, path=path, tensor=tensor, offset=offset)
