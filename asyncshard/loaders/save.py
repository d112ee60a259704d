"""Write one rank's tensors as a sharded state."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from asyncshard.format.digests import DIGESTS_KEY, load_digest
from asyncshard.format.pattern import ShardPattern
from asyncshard.format.save_id import SAVE_KEY
from asyncshard.pipeline.writing.save import Save


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
    written, the metadata says so, and loading restores it.

    The parts are written in a hidden folder and flushed to the disk; when all are there they get their names, and what
    the rank had before is removed. A save that fails or is killed before that leaves the earlier version as it was. One
    that fails while names are given takes that back; one that is killed then leaves a mark beside the parts,
    ``….asyncshard-incomplete``, by which loaders refuse the rank, and the rank's next save ends what it began, and
    removes what it left. Each part carries the id of its save, ``asyncshard.save``: a load meanwhile gets the earlier
    version or the new one, or raises a retryable error, and parts of two saves are never loaded together.

    Ranks may be saved at the same time, by any processes; a second save of one rank is refused while the first writes.
    When cancelled it finishes the part it is writing, removes what it has written, and raises; from the moment when
    parts get their names it goes on to the end. The end of the interpreter waits for the part that is being written.

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
        Written into each part. `check_checkpoint` compares what the ranks have under ``"step"``: pass the training step
        there, as text, and it tells a checkpoint of which some ranks are of an older step.
    digests : bool
        Write a digest of each tensor (xxh3-128) into the metadata of its part, so that `prepare_refresh` reads only the
        tensors that differ; without them all parts of another save do, by its id. It needs the extra ``cache``.

    Returns
    -------
    list of str
        The files, in order of part.

    Raises
    ------
    ValueError
        A number out of range, or a tensor that the format cannot hold: its dtype, layout, device or name; or a key
        among the metadata that is ours.
    ImportError
        `digests` needs a package that is not installed.
    StoreError
        The files cannot be written. It is retryable where another save of the rank is writing.
    CheckpointError
        A reshard into the directory has not ended.
    AccessDeniedError, TargetExistsError
    """
    if isinstance(max_shard_size, bool) or not isinstance(max_shard_size, int | None):
        raise TypeError(f"max_shard_size must be a number of bytes, not {max_shard_size!r}")
    if max_shard_size is not None and max_shard_size < 1:
        raise ValueError(f"max_shard_size must be 1 or more, not {max_shard_size}")
    names = pattern if isinstance(pattern, ShardPattern) else ShardPattern(*([] if pattern is None else [pattern]))
    if digests and DIGESTS_KEY in (metadata or {}):
        raise ValueError(f"metadata must not hold {DIGESTS_KEY!r}, which digests=True writes")
    if SAVE_KEY in (metadata or {}):
        raise ValueError(f"metadata must not hold {SAVE_KEY!r}, under which each save writes its own id")
    digest = load_digest() if digests else None
    # It checks the numbers before anything is written.
    save = Save(os.fspath(directory), names, rank, pp_rank, dict(metadata or {}), digest)
    return await save.run(state_dict, max_shard_size)
