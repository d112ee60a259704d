"""Typed stub of the compiled core; ``stubtest`` holds the two together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Never, Self, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from asyncshard._typing import Int64Array

_Spelling = Literal["", "parts", "digits"]

# --- memory

@final
class Region:
    nbytes: int
    def __new__(cls, nbytes: int) -> Self: ...
    def discard(self, start: int, stop: int) -> None: ...

@final
class ReturnList:
    wake: Callable[[], object] | None
    is_awaited: bool
    discards: bool
    def collect(self) -> list[int]: ...

@final
class Lease:
    start: int
    nbytes: int
    def __new__(cls, region: Region, start: int, nbytes: int, returns: ReturnList, token: int) -> Self: ...
    @property
    def address(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Span:
    nbytes: int
    def __new__(cls, address: int, nbytes: int, owner: object) -> Self: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def spread(buffer: Buffer, sources: Int64Array, targets: Int64Array, lengths: Int64Array) -> None: ...

# --- reads

@final
class StopFlag:
    def set(self) -> None: ...
    def is_set(self) -> bool: ...

def read_vectors(fd: int, offset: int, buffers: Sequence[Buffer], stop: StopFlag) -> tuple[int, int]: ...

# --- runs

def copy_runs(
    source: Buffer,
    target: Buffer,
    source_offsets: Int64Array,
    target_offsets: Int64Array,
    lengths: Int64Array,
) -> None: ...
def gather_runs(source: Buffer, offsets: Int64Array, lengths: Int64Array, buffers: Sequence[Buffer]) -> None: ...
def read_ranges(
    fd: int,
    offsets: Int64Array,
    lengths: Int64Array,
    buffers: Sequence[Buffer],
    max_gap: int,
    stop: StopFlag,
) -> tuple[int, int]: ...

# --- names, json, header

@final
class HeaderTable:
    """The tensors of one header as columns, in file order: sorted by start, stop, and position in the header."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __len__(self) -> int: ...
    def find(self, name: str) -> int:
        """Return the index of the tensor with this name, or -1 if there is none."""

    def name(self, index: int) -> str: ...
    def row(self, index: int) -> tuple[str, int, tuple[int, ...], int, int]:
        """Return a tensor's name, dtype code, shape, and the start and stop of its byte range in the file."""

    def kinds(self, spelling: _Spelling) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the kinds of tensors: tensors of one kind have the same dtype and shape, and similar names.

        Returns the kind of each tensor, and the index of the first tensor of each kind; kinds are numbered in the order
        of their first tensors. Two names are similar if they are equal after each dot-separated part that is a number
        ("parts"), or each run of digits ("digits"), is replaced by ``*``. With "" names are not compared.
        """

    def take(
        self,
        rows: NDArray[np.int64],
        shapes: Sequence[tuple[int, ...]],
        kinds: NDArray[np.int32],
        *,
        data_start: int,
        metadata: Mapping[str, str],
        names: Sequence[str] | None = None,
    ) -> Self:
        """Return a table of some rows in this order, with other shapes, whose data lies one after the other.

        `kinds` has the place in `shapes` of each row, `names` other names; dtypes stay. Raises IndexError for a row or
        a shape that is not there, ValueError for a name that is there twice and for a size no file can have.
        """

    def metadata(self) -> dict[str, str]: ...
    @property
    def starts(self) -> Int64Array:
        """Offset of each tensor's first byte in the file; read-only."""

    @property
    def stops(self) -> Int64Array: ...
    @property
    def dtype_codes(self) -> NDArray[np.uint8]:
        """Index of each tensor's dtype in ``asyncshard.format.dtypes.DTYPES``; read-only."""

    @property
    def nbytes(self) -> int: ...

def parse_header_table(data: Buffer, *, data_start: int, file_size: int, max_tensors: int) -> HeaderTable:
    """Parse the JSON text of a header, which ends at the offset `data_start` of the file.

    Raises FormatError without a path.
    """

def duplicate_names(tables: Sequence[HeaderTable], *, limit: int) -> list[tuple[str, int, int]]:
    """Return at most `limit` names that are in two tables, each with the indexes of the two in `tables`."""

# --- weight_map

@final
class WeightMap:
    """The file of each tensor, as an index.json says."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def files(self) -> tuple[str, ...]:
        """The distinct files, in the order of their first mention, as they are written: unchecked."""

    def __len__(self) -> int: ...
    def find(self, name: str) -> int:
        """Return the index in `files` of the file of a tensor, or -1 if the tensor is not mapped."""

    def entry(self, index: int) -> tuple[str, int]:
        """Return the name of the tensor at `index`, and the index in `files` of its file."""

    def name(self, index: int) -> str: ...
    def kinds(self, spelling: _Spelling) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the kinds of names as `HeaderTable.kinds` does, by the names alone."""

    def first_name(self, file_index: int) -> str:
        """Return the name of the first tensor that is mapped to a file."""

    def compare(self, file_index: int, table: HeaderTable, *, limit: int) -> tuple[list[str], list[str]]:
        """Return the names that are mapped to a file but not in its header, and those in its header but not mapped."""

def parse_weight_map(data: Buffer, *, max_entries: int) -> WeightMap:
    """Parse the text of an index.json. Raises FormatError without a path."""

# --- subtensors

def find_uncovered(
    starts: NDArray[np.uint64],
    stops: NDArray[np.uint64],
    contiguous: NDArray[np.uint8],
    groups: Int64Array,
    name_ranks: Int64Array,
    keep: NDArray[np.uint8],
) -> None: ...

# --- assignment and shapes

def assign_shards(sizes: Int64Array, num_ranks: int, out: Int64Array) -> None: ...
def check_shard_shapes(
    dims: Int64Array,
    shape_offsets: Int64Array,
    shape_ndims: Int64Array,
    local_offsets: Int64Array,
    local_ndims: Int64Array,
    shard_dims: Int64Array,
    num_shards: Int64Array,
    rank: int,
    world_size: int,
    faults: NDArray[np.uint8],
) -> None: ...
