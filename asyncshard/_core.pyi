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
    """The tensors of one header as columns, in file order: by (start, stop, place in the header)."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __len__(self) -> int: ...
    def find(self, name: str) -> int:
        """Return the index of the tensor, or -1."""

    def name(self, index: int) -> str: ...
    def row(self, index: int) -> tuple[str, int, tuple[int, ...], int, int]:
        """Return name, code of the dtype, shape, and the half-open byte range of the file."""

    def kinds(self, spelling: _Spelling) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the tensors that have the same dtype and shape, and whose names are alike.

        Returns the number of each tensor, and the index of the first tensor of each number; numbers ascend with these.
        Names are looked at with ``*`` for each part that is a number ("parts"), with ``*`` for each run of digits
        ("digits"), or not at all ("").
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
        """First byte of each tensor, from the beginning of the file; read-only."""

    @property
    def stops(self) -> Int64Array: ...
    @property
    def dtype_codes(self) -> NDArray[np.uint8]:
        """Places in ``asyncshard.format.dtypes.DTYPES``; read-only."""

    @property
    def nbytes(self) -> int: ...

def parse_header_table(data: Buffer, *, data_start: int, file_size: int, max_tensors: int) -> HeaderTable:
    """Parse the JSON text of a header, which ends where the data starts. Raises FormatError, without a path."""

def duplicate_names(tables: Sequence[HeaderTable], *, limit: int) -> list[tuple[str, int, int]]:
    """Return at most `limit` names that are in two tables, each with the places of both in `tables`."""

# --- weight_map

@final
class WeightMap:
    """The file of each tensor, as an index.json tells it."""

    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def files(self) -> tuple[str, ...]:
        """The distinct files, in order of first mention, as they are written: not confined."""

    def __len__(self) -> int: ...
    def find(self, name: str) -> int:
        """Return the place in `files` of the tensor's file, or -1."""

    def entry(self, index: int) -> tuple[str, int]:
        """Return a tensor's name, and the place in `files` of its file, for each index below the length."""

    def name(self, index: int) -> str: ...
    def kinds(self, spelling: _Spelling) -> tuple[NDArray[np.int32], Int64Array]:
        """Number the names that are alike, as `HeaderTable.kinds` does."""

    def first_name(self, file_index: int) -> str:
        """Return the first tensor that is mapped to the file."""

    def compare(self, file_index: int, table: HeaderTable, *, limit: int) -> tuple[list[str], list[str]]:
        """Return the names mapped to the file that its header lacks, and those it has that are not mapped to it."""

def parse_weight_map(data: Buffer, *, max_entries: int) -> WeightMap:
    """Parse the text of an index.json. Raises FormatError, without a path."""

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
