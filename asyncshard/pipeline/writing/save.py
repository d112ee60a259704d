"""The save of one rank's tensors: its files are written in a hidden folder of the rank's, and get their names at once.

The ranks of a checkpoint are saved by different processes into one directory, so lock, mark and commit are the rank's
own. All files of a save carry its id in their metadata (:mod:`asyncshard.format.save_id`), by which readers tell a
mixture of two saves. All but `Save.run` blocks: call it in threads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncshard.format.digests import DIGESTS_KEY, DIGITS, Digest
from asyncshard.format.dtypes import Dtype
from asyncshard.format.header import PREFIX_BYTES, header_size, parse_header
from asyncshard.format.pattern import ShardPattern
from asyncshard.format.save_id import SAVE_KEY, SaveId
from asyncshard.pipeline.writing.directory import DirectoryWriter, Role
from asyncshard.pipeline.writing.state_tensors import StateTensor, split_state
from asyncshard.plan.files.incomplete import INCOMPLETE_NAME, incomplete, rank_mark
from asyncshard.plan.ties import tie_metadata
from asyncshard.stores.local.files import translated
from asyncshard.tasks.exit_gate import EXIT_GATE
from asyncshard.tasks.threads import DaemonThreads, wait_to_end

_FOLDER = re.compile(r"\.asyncshard-.+\.tmp")
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
"""The names of dtypes in safetensors' writer, where they are not the kind and its bits, as in ``float32``."""
_KINDS = {"F": "float", "I": "int", "U": "uint"}
_NO_DIGEST = "0" * DIGITS


class Save:
    """One save of one rank.

    Parameters
    ----------
    directory : str
    pattern : ShardPattern
        Names of the files.
    rank, pp_rank : int
    metadata : dict of str to str
        Of the caller, for each file.
    digest : function, optional
        Makes the digests of tensors, where these are to be written.
    """

    def __init__(
        self,
        directory: str,
        pattern: ShardPattern,
        rank: int,
        pp_rank: int,
        metadata: dict[str, str],
        digest: Digest | None,
    ) -> None:
        self._pattern = pattern
        self._rank = rank
        self._pp_rank = pp_rank
        self._metadata = metadata
        self._digest = digest
        role = Role(
            f".asyncshard-{pattern.format_for_rank(rank, 0, pp_rank)}.tmp",
            rank_mark(pattern, rank, pp_rank),
            "A save of this rank has not ended: its files are not whole. Save the rank again.",
            f"another save of rank {rank} is writing there; wait for it to end",
        )
        self._writer = DirectoryWriter(directory, role, requires_lock=False)
        self._directory = directory

    async def run(self, state_dict: Mapping[str, Any], max_shard_size: int | None) -> list[str]:
        """Write the tensors; return the paths of the files, in order of part."""
        threads = DaemonThreads(1, "asyncshard-write")
        try:
            parts = await threads.run(_split, state_dict, max_shard_size)
            await threads.run(self._begin)
            for number, part in enumerate(parts):
                await threads.run(self._write, number, part, SaveId(self._writer.id, len(parts)))
            return await threads.run(self._commit, len(parts))
        finally:
            # One future: a cancel that comes while it runs is raised when all is closed.
            await wait_to_end(asyncio.ensure_future(self._close(threads)))

    async def _close(self, threads: DaemonThreads) -> None:
        try:
            await threads.run_to_end(self._writer.clean_up)
        finally:
            await threads.aclose()

    def _begin(self) -> None:
        self._writer.begin()
        with translated(self._directory):
            if os.path.lexists(os.path.join(self._directory, INCOMPLETE_NAME)):
                raise incomplete(self._directory)
            self._writer.resume()
            if not os.path.lexists(os.path.join(self._directory, rank_mark(self._pattern, self._rank, self._pp_rank))):
                self._writer.remove_leftovers()

    def _name(self, number: int) -> str:
        return self._pattern.format_for_rank(self._rank, number, self._pp_rank)

    def _write(self, number: int, tensors: list[StateTensor], save: SaveId) -> None:
        from safetensors import SafetensorError, TensorSpec, serialize_file

        name = self._name(number)
        path = self._writer.path_of(name)
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
        with translated(os.path.join(self._directory, name)):
            try:
                with EXIT_GATE:  # Rust
                    serialize_file(specs, path, metadata=self._metadata_of(tensors, save))
            except SafetensorError as error:
                raise _os_error(error) from error
            if self._digest is not None:
                by_name = {tensor.name: array for tensor, array in zip(tensors, arrays, strict=True)}
                _write_digests(path, by_name, self._digest)
        self._writer.flush(name)

    def _metadata_of(self, tensors: list[StateTensor], save: SaveId) -> dict[str, str]:
        """Return the metadata of a part; digests are not known before the order of its tensors is."""
        ties = tie_metadata({other: tensor.name for tensor in tensors for other in tensor.other_names})
        digests = {DIGESTS_KEY: _NO_DIGEST * len(tensors)} if self._digest is not None else {}
        return ties | self._metadata | digests | {SAVE_KEY: str(save)}

    def _commit(self, parts: int) -> list[str]:
        """Give the files their names, in place of all that the rank had."""
        names = [self._name(number) for number in range(parts)]
        with translated(self._directory):
            present = os.listdir(self._directory)
        own = self._pp_rank, self._rank
        old = [name for name in present if (shard := self._pattern.parse(name)) is not None and shard[:2] == own]
        self._writer.require_no_folders(old)
        self._writer.commit(names, old)
        return [os.path.join(self._directory, name) for name in names]


def _split(state_dict: Mapping[str, Any], max_shard_size: int | None) -> list[list[StateTensor]]:
    with EXIT_GATE:  # C++, for tensors of torch
        return split_state(state_dict, max_shard_size)


def is_save_folder(name: str) -> bool:
    """Return whether a folder has the name of those that saves write in."""
    return _FOLDER.fullmatch(name) is not None


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


def _spec_name(dtype: Dtype) -> str:
    if dtype.name in _SPEC_NAMES:
        return _SPEC_NAMES[dtype.name]
    return _KINDS[dtype.name[0]] + dtype.name[1:]
