"""A store around another store: the base class of stores that cache, delay or break the reads of another."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.events import Listener
from asyncshard.stores.base import Listing, ObjectMeta, Store


class WrapperStore(Store):
    """Passes everything on to another store, and has its pacing and its listeners. Closing it closes that store.

    `read_ranges` alone is not passed on: it goes through the wrapper's own `read_into`.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url
        self.pacing = store.pacing
        self.held_bytes = store.held_bytes

    def __repr__(self) -> str:
        facts = "".join(f"{fact}, " for fact in self._facts())
        return f"<{type(self).__name__} {facts}around {self.store!r}>"

    def _listeners(self) -> list[Listener]:
        return self.store._listeners()

    def path_of(self, name: str) -> str:
        return self.store.path_of(name)

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        return self.store.fingerprint(meta)

    def identity(self, meta: ObjectMeta) -> str | None:
        return self.store.identity(meta)

    async def list(self) -> Listing:
        return await self.store.list()

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        return await self.store.open(name, nbytes)

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        await self.store.read_into(meta, start, buffers)

    async def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        return await self.store.read(name, max_bytes=max_bytes)

    async def aclose(self) -> None:
        await self.store.aclose()
