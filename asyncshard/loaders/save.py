"""Write one rank's tensors as a sharded state."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from asyncshard.arrays.frameworks import load_library
from asyncshard.arrays.subtensors import SubtensorFilter
from asyncshard.errors import DestinationError
from asyncshard.format.digests import DIGESTS_KEY, DIGITS, Digest, load_digest
from asyncshard.format.dtypes import Dtype, from_numpy
from asyncshard.format.header import PREFIX_BYTES, header_size, parse_header
from asyncshard.format.pattern import ShardPattern
from asyncshard.plan.ties import tie_metadata
from asyncshard.stores.local.files import translated
from asyncshard.tasks.threads import DaemonThreads

_SPEC_NAMES = {
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "BF16": "bfloat16",
    "C64": "complex64",
}
"""What safetensors calls the types on writing, where that is not the kind and its bits, as in ``float32``."""
_KINDS = {"F": "float", "I": "int", "U": "uint"}
_NO_DIGEST = "0" * DIGITS


class _Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    array: NDArray[Any]
    """Its memory as unsigned integers, contiguous or not."""
    dtype: Dtype
    other_names: tuple[str, ...] = ()
    """Of tensors that were left out because they are this one."""

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


async def save_sharded_state(
    state_dict: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    rank: int,
    pattern: str | ShardPattern | None = None,
    max_shard_size: int | None = None,
    pp_rank: int = 0,
    metadata: Mapping[str, str] | None = None,
    digests: bool = False,
) -> list[str]:
    """Write one rank's shards, off the event loop.

    Tensors whose memory another one covers are left out (`SubtensorFilter`); where one of them is the same as what is
    written, the metadata says so, and loading restores it. Each part is written under a temporary name, flushed to the
    disk and renamed when it is complete; this rank's parts of an earlier save that are not written again are removed
    last. When cancelled it finishes the part it is writing, removes what was not renamed, and raises.

    Parameters
    ----------
    state_dict : mapping of str to array or tensor
        NumPy arrays or CPU torch tensors. They are read in place and must not change meanwhile; a strided one
        is copied.
    directory : str or path
        Made if it does not exist.
    rank : int
    pattern : str or ShardPattern, optional
        Names of the files; by default ``model-rank-{rank}-part-{part}.safetensors``.
    max_shard_size : int, optional
        Bytes of tensors in a part at most; a larger tensor has a part of its own. By default there is one part.
    pp_rank : int
        For patterns that have one.
    metadata : mapping of str to str, optional
        Written into each part.
    digests : bool
        Write a digest of each tensor (xxh3-128) into the metadata of its part, so that `prepare_refresh` reads only the
        tensors that differ. It needs the extra ``cache``.

    Returns
    -------
    list of str
        The files, in order of part.

    Raises
    ------
    ValueError
        A number out of range, or a tensor that the format cannot hold: its dtype, layout, device or name; or, with
        `digests`, their key among the metadata.
    ImportError
        `digests` needs a package that is not installed.
    AccessDeniedError, StoreError
    """
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int | None):
        raise TypeError(f"max_shard_size must be a number of bytes, not {max_shard_size!r}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ValueError(f"max_shard_size must be 1 or more, not {max_shard_size}")
    names = pattern if isinstance(pattern, ShardPattern) else ShardPattern(*([] if pattern is None else [pattern]))
    if digests and DIGESTS_KEY in (metadata or {}):
        raise ValueError(f"metadata must not hold {DIGESTS_KEY!r}, which digests=True writes")
    digest = load_digest() if digests else None
    save = _Save(os.fspath(directory), names, rank, pp_rank, dict(metadata or {}), digest)
    names.format_for_rank(rank, 0, pp_rank)  # checks the numbers before anything is written
    threads = DaemonThreads(1, "asyncshard-write")
    try:
        parts = await threads.run(_split, state_dict, max_shard_size)
        await threads.run(save.begin)
        for number, part in enumerate(parts):
            await threads.run(save.write, number, part)
        return await threads.run(save.commit)
    finally:
        threads.submit(save.clean_up)
        await threads.aclose()


class _Save:
    """The files of one save."""

    def __init__(
        self,
        directory: str,
        pattern: ShardPattern,
        rank: int,
        pp_rank: int,
        metadata: dict[str, str],
        digest: Digest | None,
    ) -> None:
        self._directory = directory
        self._pattern = pattern
        self._rank = rank
        self._pp_rank = pp_rank
        self._metadata = metadata
        self._digest = digest
        self._temporary: dict[str, str] = {}
        """Where each finished or begun file is until it gets its name."""

    def begin(self) -> None:
        with translated(self._directory):
            os.makedirs(self._directory, exist_ok=True)

    def write(self, number: int, tensors: list[_Tensor]) -> None:
        from safetensors import SafetensorError, TensorSpec, serialize_file

        path = os.path.join(self._directory, self._pattern.format_for_rank(self._rank, number, self._pp_rank))
        temporary = f"{path}.{os.getpid()}.tmp"
        self._temporary[path] = temporary
        arrays = [np.ascontiguousarray(tensor.array) for tensor in tensors]
        specs = {
            tensor.name: TensorSpec(
                dtype=_spec_name(tensor.dtype),
                shape=list(tensor.array.shape),
                data_ptr=array.__array_interface__["data"][0],
                data_len=array.nbytes,
            )
            for tensor, array in zip(tensors, arrays, strict=True)
        }
        with translated(temporary):
            try:
                serialize_file(specs, temporary, metadata=self._metadata_of(tensors) or None)
            except SafetensorError as error:
                raise _os_error(error) from error
            if self._digest is not None:
                by_name = {tensor.name: array for tensor, array in zip(tensors, arrays, strict=True)}
                _write_digests(temporary, by_name, self._digest)
            _flush(temporary)

    def _metadata_of(self, tensors: list[_Tensor]) -> dict[str, str]:
        """Return the metadata of a part; digests are not known before the order of its tensors is."""
        ties = tie_metadata({other: tensor.name for tensor in tensors for other in tensor.other_names})
        digests = {DIGESTS_KEY: _NO_DIGEST * len(tensors)} if self._digest is not None else {}
        return ties | self._metadata | digests

    def commit(self) -> list[str]:
        """Give the files their names, then remove this rank's other parts."""
        written = list(self._temporary)
        with translated(self._directory):
            for path, temporary in list(self._temporary.items()):
                os.replace(temporary, path)
                del self._temporary[path]
            for name in os.listdir(self._directory):
                shard = self._pattern.parse(name)
                path = os.path.join(self._directory, name)
                if shard is not None and shard[:2] == (self._pp_rank, self._rank) and path not in written:
                    os.unlink(path)
            _flush(self._directory)
        return written

    def clean_up(self) -> None:
        for temporary in self._temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _write_digests(path: str, arrays: Mapping[str, NDArray[Any]], digest: Digest) -> None:
    """Put the tensors' digests in the place that the header keeps for them, in the order that the header has."""
    size = os.path.getsize(path)
    with open(path, "r+b") as file:
        head = file.read(PREFIX_BYTES)
        head += file.read(header_size(head, size, path=path) - PREFIX_BYTES)
        header = parse_header(head, size, path=path)
        key = f'"{DIGESTS_KEY}":"'.encode()
        # A quote within any other string of the JSON has a backslash before it: this is the key.
        place = head.index(key + _NO_DIGEST.encode() * len(header) + b'"') + len(key)
        file.seek(place)
        for name in header:
            file.write(digest(arrays[name].reshape(-1).view(np.uint8).data).hex().encode())


def _os_error(error: Exception) -> OSError:
    """Return the OSError that safetensors tells of in words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(errno.EIO, str(error))


def _flush(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _split(state_dict: Mapping[str, Any], max_shard_size: int | None) -> list[list[_Tensor]]:
    """Cut a state dict into parts, in its own order."""
    parts: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in _tensors(state_dict):
        if max_shard_size is not None and parts[-1] and size + tensor.nbytes > max_shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    return parts


def _tensors(state_dict: Mapping[str, Any]) -> Iterator[_Tensor]:
    kept = SubtensorFilter.filter_subtensors(state_dict)
    others = _names_left_out(state_dict, kept)
    for name, value in kept.items():
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are str, not {name!r}")
        if name == "__metadata__":
            raise ValueError("a tensor cannot be named '__metadata__': the format keeps that name for itself")
        array, dtype = _raw(name, value)
        yield _Tensor(name, array, dtype, tuple(others.get(_identity(value, array), ())))


def _names_left_out(state_dict: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[Hashable, list[str]]:
    """Return the names of the tensors that were left out, by what they are."""
    names: dict[Hashable, list[str]] = {}
    for name, value in state_dict.items():
        if name not in kept and isinstance(name, str):
            with contextlib.suppress(ValueError):  # of a dtype that cannot be written: it is none of those that are
                array, _ = _raw(name, value)
                names.setdefault(_identity(value, array), []).append(name)
    return names


def _identity(value: Any, array: NDArray[Any]) -> Hashable:
    """Return what two tensors have in common that are the same."""
    return array.__array_interface__["data"][0], str(value.dtype), array.shape, array.strides


def _raw(name: str, value: Any) -> tuple[NDArray[Any], Dtype]:
    """Return a tensor's memory as unsigned integers, and its dtype."""
    if isinstance(value, np.ndarray):
        value = value.view(np.ndarray).astype(value.dtype.newbyteorder("<"), copy=False)
        dtype = from_numpy(value.dtype)
        array = value if dtype is None else value.view(f"u{value.dtype.itemsize}")
    else:
        try:
            array, dtype = load_library("pt").memory_of(name, value)
        except DestinationError as error:
            raise ValueError(
                f"tensor {name!r} cannot be written: it must be a strided tensor on the CPU, with memory of its own "
                f"and a dtype that safetensors files can hold, not {value.dtype}, {value.layout}, {value.device}"
            ) from error
        if dtype is not None and dtype.bits < 8 and not array.shape:
            raise ValueError(
                f"tensor {name!r} cannot be written: a {value.dtype} needs a dimension, as it is two elements"
            )
    if dtype is None:
        raise ValueError(f"tensor {name!r} has dtype {value.dtype}, which safetensors files cannot hold")
    return array, dtype


def _spec_name(dtype: Dtype) -> str:
    if dtype.name in _SPEC_NAMES:
        return _SPEC_NAMES[dtype.name]
    return _KINDS[dtype.name[0]] + dtype.name[1:]
