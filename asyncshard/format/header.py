"""The header of a safetensors file: its length, its tensors, its metadata.

A file has 8 bytes with a little-endian unsigned 64-bit number ``n``, then ``n`` bytes of UTF-8 JSON, then the data of
the tensors, to the end of the file. ``docs/format.md`` states the rules, by number. Nothing here reads a file:
`header_size` takes the first 8 bytes and returns how many bytes `parse_header` needs. The compiled core checks the JSON
and the rules for tensors (types, shapes, sizes, offsets without a hole or an overlap), without the GIL.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard._core import HeaderTable, parse_header_table
from asyncshard.errors import FormatError
from asyncshard.format.dtypes import DTYPES

if TYPE_CHECKING:
    from typing_extensions import Buffer

PREFIX_BYTES = 8
"""The 8 bytes that hold the length ``n`` of the JSON text."""
MAX_HEADER_BYTES = 100_000_000
"""The format's limit on ``n``: 100 million bytes."""

_ALIGNMENT = 8
"""The data begins at a multiple of 8, the size in bytes of the format's widest element."""
_QUOTED = 1 << 16
"""65,536 characters of a string are quoted at a time."""
_DTYPE_NAMES = tuple(dtype.name for dtype in DTYPES)
_REMEDY = "the file is damaged or no safetensors file: fetch or write it again"


class TensorInfo(NamedTuple):
    """The entry of one tensor in a header: its type, its shape, and its byte range in the file."""

    name: str
    dtype: str
    """The format's name of the element type, such as ``"BF16"``; a key of `asyncshard.format.dtypes.by_name`."""
    shape: tuple[int, ...]
    """The shape in elements; a dimension of an empty tensor may be as large as 2**64 - 1."""
    start: int
    """Offset of the tensor's first byte from the beginning of the file (not of the data)."""
    stop: int
    """Offset of the byte after the tensor's last one: the byte range is half-open."""

    @property
    def nbytes(self) -> int:
        """The number of bytes of the tensor in its file."""
        return self.stop - self.start


class Header(Mapping[str, TensorInfo]):
    """The tensors of one file by name, in the order of their bytes. Immutable; made by `parse_header` or `take`.

    The tensors are stored as a few arrays, however many there are. Each look-up makes a new `TensorInfo`.
    """

    __slots__ = ("file_size", "size", "table")

    def __init__(self, table: HeaderTable, *, size: int, file_size: int) -> None:
        self.table = table
        """The tensors as columns, for code that plans over all tensors at once."""
        self.size = size
        """The number of bytes of the file before the data of the tensors: 8 + n."""
        self.file_size = file_size
        """The number of bytes of the whole file."""

    def __getitem__(self, name: str) -> TensorInfo:
        index = self.table.find(name)
        if index < 0:
            raise KeyError(name)
        return self.at(index)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.table.find(name) >= 0

    def __iter__(self) -> Iterator[str]:
        return map(self.table.name, range(len(self.table)))

    def __len__(self) -> int:
        return len(self.table)

    def at(self, index: int) -> TensorInfo:
        """Return the tensor at `index` in file order; IndexError outside 0 to len - 1."""
        name, code, shape, start, stop = self.table.row(index)
        return TensorInfo(name, _DTYPE_NAMES[code], shape, start, stop)

    @property
    def metadata(self) -> dict[str, str]:
        """The ``__metadata__`` of the header as a new dict, empty if the header has none."""
        return self.table.metadata()

    @property
    def nbytes(self) -> int:
        """The number of bytes of memory that the header takes."""
        return self.table.nbytes

    def take(
        self,
        rows: NDArray[np.int64],
        shapes: Sequence[tuple[int, ...]],
        kinds: NDArray[np.int32],
        *,
        metadata: Mapping[str, str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Header:
        """Return the header of a file that would hold some of the tensors, in other shapes, after as large a header.

        Parameters
        ----------
        rows : array of int64
            The tensors, in the order of their data there; none twice.
        shapes : sequence of tuple of int
            The distinct shapes.
        kinds : array of int32
            The place in `shapes` of each tensor's.
        names : sequence of str, optional
            What the tensors are called there; by default as here.

        Raises
        ------
        IndexError
            There is no such tensor, or no such shape.
        ValueError
            Two tensors have one name, or one ends within a byte or beyond 2**63 - 1 bytes.
        """
        table = self.table.take(rows, shapes, kinds, data_start=self.size, metadata=metadata or {}, names=names)
        return Header(table, size=self.size, file_size=int(table.stops[-1]) if len(table) else self.size)

    def __repr__(self) -> str:
        return f"<Header of {len(self)} tensors in {self.file_size} bytes>"


class HeaderLimits(NamedTuple):
    """Limits on the size of a header, in addition to those of the format."""

    max_header_bytes: int | None = None
    """The most bytes of JSON text that a header may have; None for the format's limit alone."""
    max_tensors: int | None = None
    """The most tensors that a header may list; None for no limit."""


def header_size(prefix: Buffer, file_size: int, *, max_header_bytes: int | None = None, path: str | None = None) -> int:
    """Return how many bytes of the file come before the data of its tensors (8 + n), given its first 8 bytes.

    Checks rules 1 to 3 of ``docs/format.md``, which must hold before memory for the header is allocated.
    `max_header_bytes` may lower the format's limit on ``n``; it cannot raise it.

    Raises
    ------
    FormatError
        The file is shorter than 8 bytes or than its header, or ``n`` is above the limit.
    ValueError
        `prefix` is shorter than 8 bytes though the file is not.
    """
    if file_size < PREFIX_BYTES:
        raise _error(f"a safetensors file has at least 8 bytes, this one {file_size}; {_REMEDY}", path, offset=0)
    with memoryview(prefix).cast("B") as octets:
        if len(octets) < PREFIX_BYTES:
            raise ValueError(f"the first 8 bytes of the file are needed, not {len(octets)}")
        length = int.from_bytes(octets[:PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _error(
            f"the header would be {length} bytes long, over the format's limit of {MAX_HEADER_BYTES}; {_REMEDY}",
            path,
            offset=0,
        )
    if max_header_bytes is not None and length > max_header_bytes:
        raise _error(
            f"the header is {length} bytes long, over max_header_bytes={max_header_bytes}; raise that to read the file",
            path,
            offset=0,
        )
    if length > file_size - PREFIX_BYTES:
        raise _error(
            f"the header would be {length} bytes long, and the file has {file_size}: it is cut short; {_REMEDY}",
            path,
            offset=0,
        )
    return PREFIX_BYTES + length


def parse_header(
    data: Buffer,
    file_size: int | None = None,
    *,
    max_tensors: int | None = None,
    max_header_bytes: int | None = None,
    path: str | None = None,
) -> Header:
    """Parse and check the header of a safetensors file.

    Parameters
    ----------
    data
        The bytes of the file from the first one, at least to the end of the header. No reference to `data` is kept. It
        must not be written to during the call.
    file_size
        The number of bytes of the file; None if `data` is the whole file.
    max_tensors, max_header_bytes
        A header with more tensors or bytes is refused; None means that only the format's limits hold.
    path
        Names the file in error messages.

    The function is pure and thread-safe, and holds the GIL only for microseconds, whatever the header's size.

    Raises
    ------
    FormatError
        A rule of the format is broken; the message names the rule, the tensor and the byte.
    ValueError
        `data` ends within the header of a file that does not.
    """
    with memoryview(data).cast("B") as octets:
        whole = len(octets) if file_size is None else file_size
        size = header_size(octets, whole, max_header_bytes=max_header_bytes, path=path)
        if len(octets) < size:
            raise ValueError(f"the header takes the first {size} bytes of the file, and data has {len(octets)}")
        with octets[PREFIX_BYTES:size] as text:
            try:
                table = parse_header_table(
                    text,
                    data_start=size,
                    file_size=whole,
                    max_tensors=sys.maxsize if max_tensors is None else max_tensors,
                )
            except FormatError as error:
                raise _error(str(error), path, tensor=error.tensor, offset=error.offset) from None
    return Header(table, size=size, file_size=whole)


def format_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None = None
) -> bytearray:
    """Return the bytes of a file, up to the data, that holds these tensors one after the other.

    Parameters
    ----------
    tensors : iterable of (name, dtype, shape, nbytes)
        The tensors in the order of their data; `dtype` is the format's name of an element type. They are not checked.
    metadata : mapping of str to str, optional
        The ``__metadata__`` of the header.

    The JSON text is padded with spaces so that the data begins at a multiple of 8.
    """
    # The text grows in steps, between which other threads get the GIL: one step for all would hold it for megabytes.
    text = bytearray(PREFIX_BYTES)
    text += b"{"
    for number, (key, value) in enumerate((metadata or {}).items()):
        text += b', "' if number else b'"__metadata__":{"'
        _quote(text, key)
        text += b'": "'
        _quote(text, value)
        text += b'"'
    if metadata:
        text += b"},"
    start = 0
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, dtype, shape, nbytes in tensors:
        kind = kinds.get((dtype, shape))
        if kind is None:
            sizes = ",".join(map(str, shape))
            kind = kinds[dtype, shape] = f':{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":['
        stop = start + nbytes
        text += f"{encode_basestring_ascii(name)}{kind}{start},{stop}]}},".encode("ascii")
        start = stop
    if text.endswith(b","):
        text.pop()
    text += b"}"
    text += b" " * (-len(text) % _ALIGNMENT)
    text[:PREFIX_BYTES] = (len(text) - PREFIX_BYTES).to_bytes(PREFIX_BYTES, "little")
    return text


def _quote(text: bytearray, value: str) -> None:
    """Append the JSON form of a string to `text`, without the quotes around it."""
    for start in range(0, len(value), _QUOTED):
        text += encode_basestring_ascii(value[start : start + _QUOTED])[1:-1].encode("ascii")


def _error(message: str, path: str | None, *, tensor: str | None = None, offset: int | None = None) -> FormatError:
    prefixed = message if path is None else f"{path}: {message}"
    return FormatError(prefixed, path=path, tensor=tensor, offset=offset)
