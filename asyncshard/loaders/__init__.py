"""The loaders and the writers, which users call, and the short forms `load` and `stream`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncshard.loaders.sharded_state import ShardedStateLoader
from asyncshard.loaders.streaming import AsyncShardLoader
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.stores.opening import ModelPath

__all__ = ["load", "stream"]


async def load(path: ModelPath, **options: Any) -> dict[str, Any]:
    """Load a checkpoint as a dict of new arrays, which the caller owns: ``weights = await asyncshard.load(path)``.

    Parameters
    ----------
    path : str, path or Store
        A local path or URL, or a store of your own.
    **options
        Arguments of `ShardedStateLoader`: ``rank``, ``world_size``, ``framework``, ``memory_budget_mb`` and so on.

    Raises
    ------
    AsyncShardError
        The load has failed. `asyncshard.errors` lists the subclasses.
    """
    return await ShardedStateLoader(**options).load_weights(path)


def stream(
    path: ModelPath, into: Mapping[str, Any] | None = None, *, strict: bool = True, cast: bool = False, **options: Any
) -> Stream:
    """Return a stream over a checkpoint: ``async with asyncshard.stream(path) as weights: ...``.

    The arguments are those of `AsyncShardLoader.stream`. The `options` are arguments of `ShardedStateLoader`.
    """
    return AsyncShardLoader(ShardedStateLoader(**options)).stream(path, into, strict=strict, cast=cast)
