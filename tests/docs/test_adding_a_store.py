"""The store that ``docs/adding-a-store.md`` shows does what every store must do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

import asyncshard
from asyncshard.errors import StoreError

TEXT = (Path(__file__).parents[2] / "docs" / "adding-a-store.md").read_text()
STORE, TESTS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
SHOWN: dict[str, Any] = {"__name__": __name__}
for block in (STORE, TESTS):
    exec(compile(block, "docs/adding-a-store.md", "exec"), SHOWN)


class TestStoreOfTheDocument(SHOWN["TestSqliteStore"]):
    async def test_a_checkpoint_is_loaded_from_it(self) -> None:
        weight = np.arange(12, dtype=np.float32).reshape(3, 4)
        async with await self.make_store({"model.safetensors": save({"weight": weight})}) as store:
            weights = await asyncshard.load(store)
        np.testing.assert_array_equal(weights["weight"], weight)

    async def test_a_database_that_is_missing_is_an_error_that_names_it(self, tmp_path: Path) -> None:
        async with SHOWN["SqliteStore"](f"sqlite://{tmp_path}/absent.db") as store:
            with pytest.raises(StoreError, match=r"absent\.db: the database cannot be read"):
                await store.list()


def test_the_store_of_the_document_is_short() -> None:
    assert len(STORE.splitlines()) < 60
