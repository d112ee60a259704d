"""Files of a rank that go away between the listing and their opening.

Mixtures of two saves are tested in ``tests/pipeline/writing/test_save.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import asyncshard
from asyncshard import save_sharded_state
from asyncshard.errors import ObjectChangedError, ObjectNotFoundError
from asyncshard.stores import ObjectMeta, from_url
from asyncshard.stores.wrapper import WrapperStore

LAST = "model-rank-0-part-1.safetensors"


class LosingStore(WrapperStore):
    """Finds its last file gone when it is opened for the first time."""

    def __init__(self, path: Path, *, comes_back: bool) -> None:
        super().__init__(from_url(path))
        self._path = path / LAST
        self._comes_back = comes_back
        self.opened = 0

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        if name == LAST:
            self.opened += 1
            if self.opened == 1:
                away = self._path.with_suffix(".away")
                os.replace(self._path, away)
                try:
                    return await super().open(name, nbytes)
                finally:
                    if self._comes_back:
                        os.replace(away, self._path)
        return await super().open(name, nbytes)


@pytest.mark.parametrize("comes_back", [True, False])
async def test_a_file_that_goes_away_after_the_listing_is_a_changed_object(tmp_path: Path, comes_back: bool) -> None:
    await save_sharded_state({"a": np.ones(4), "b": np.ones(4)}, tmp_path, rank=0, max_shard_size=1)
    store = LosingStore(tmp_path, comes_back=comes_back)
    with pytest.raises(ObjectChangedError, match=f"{LAST}: the file was replaced or removed") as caught:
        await asyncshard.load(store)
    assert caught.value.retryable
    await store.aclose()


async def test_a_link_to_nothing_is_not_found(tmp_path: Path) -> None:
    await save_sharded_state({"a": np.ones(4)}, tmp_path, rank=0)
    (tmp_path / LAST).symlink_to(tmp_path / "nothing")
    with pytest.raises(ObjectNotFoundError, match="points to nothing"):
        await asyncshard.load(tmp_path)
