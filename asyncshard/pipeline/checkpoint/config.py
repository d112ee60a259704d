"""A model's ``config.json``."""

from __future__ import annotations

import json
from typing import Any

from asyncshard.errors import CheckpointError
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import DaemonThreads

CONFIG_NAME = "config.json"
_MAX_BYTES = 1 << 24


async def read_config(store: Store, threads: DaemonThreads) -> Any:
    """Return the value of its JSON, which is an object where the file is what it should be; off the event loop.

    Raises
    ------
    CheckpointError
        It is not JSON.
    FormatError
        It is too large for a config.
    ObjectNotFoundError, AccessDeniedError, StoreError
    """
    data = await store.read(CONFIG_NAME, max_bytes=_MAX_BYTES)
    try:
        return await threads.run(json.loads, data)
    except (ValueError, RecursionError) as error:
        path = store.path_of(CONFIG_NAME)
        raise CheckpointError(f"{path}: this is not JSON: {error}; fetch or write it again", path=path) from None
