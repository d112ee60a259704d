"""A store around another store: the base of those that cache, delay or break what another reads."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.stores.base import Listing, ObjectMeta, Store


class WrapperStore(Store):
    """Passes everything on to another store, what suits it too. Closing it closes that store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.url = store.url

    @property
    def retries(self) -> int:  # type: ignore[override]
        """Requests of the other store made again so far."""
        return self.store.retries

    @property
    def verified(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other store compared with a checksum."""
        return self.store.verified

    @property
    def unverified(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the other store could not compare, or not yet."""
        return self.store.unverified

    @property
    def chunk_size(self) -> int:  # type: ignore[override]
        """What suits the other store."""
        return self.store.chunk_size

    @property
    def prefetch_count(self) -> int:  # type: ignore[override]
        """What suits the other store."""
        return self.store.prefetch_count

    @property
    def max_gap_bytes(self) -> int:  # type: ignore[override]
        """What suits the other store."""
        return self.store.max_gap_bytes

    @property
    def held_bytes(self) -> int:  # type: ignore[override]
        """What the other store takes."""
        return self.store.held_bytes

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
