"""Stores for tests: one in memory, and wrappers that delay, hold or break the reads of any store."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from asyncshard.errors import ObjectChangedError, ObjectNotFoundError, TruncatedError
from asyncshard.stores.base import ETAG, Listing, ObjectMeta, Store
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.tasks.threads import wait_to_end


class MemoryStore(Store):
    """A store whose files are in memory. Every call gives the event loop one turn before it reads."""

    def __init__(self, files: Mapping[str, bytes], url: str = "memory://checkpoint") -> None:
        self.url = url
        self._files = {name: (0, bytes(data)) for name, data in files.items()}
        self._writes = 0

    def fingerprint(self, meta: ObjectMeta) -> str | None:
        version, data = self._find(meta.name)
        if version != meta.version:
            return None
        return f'{ETAG}"{hashlib.md5(data, usedforsecurity=False).hexdigest()}" {meta.size}'

    def replace(self, name: str, data: bytes) -> None:
        """Put an object into the store, in place of the one of this name if there is one."""
        self._writes += 1
        self._files[name] = (self._writes, bytes(data))

    def remove(self, name: str) -> None:
        """Remove an object from the store."""
        del self._files[name]

    async def list(self) -> Listing:
        await asyncio.sleep(0)
        return Listing(tuple(sorted(name for name in self._files if "/" not in name)), is_file=False)

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        await asyncio.sleep(0)
        version, data = self._find(name)
        return ObjectMeta(name, len(data), version), data[:nbytes]

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        await asyncio.sleep(0)
        version, data = self._find(meta.name)
        path = self.path_of(meta.name)
        if version != meta.version:
            raise ObjectChangedError(f"{path}: the object was replaced while it was being loaded", path=path)
        stop = start + sum(buffer.nbytes for buffer in buffers)
        if stop > len(data):
            raise TruncatedError(
                f"{path}: the object has {len(data)} bytes, not the {stop} that are needed",
                path=path,
                start=start,
                stop=stop,
            )
        for buffer in buffers:
            buffer.cast("B")[:] = data[start : start + buffer.nbytes]
            start += buffer.nbytes

    def identity(self, meta: ObjectMeta) -> str:
        return json.dumps([self.url, meta.name, meta.version, meta.size])

    def _find(self, name: str) -> tuple[int, bytes]:
        try:
            return self._files[name]
        except KeyError:
            path = self.path_of(name)
            raise ObjectNotFoundError(f"{path}: no such object", path=path) from None


class LatencyStore(WrapperStore):
    """A wrapper that delays every call by `delay_s`, like a network. To test an order of reads, use `GatedStore`."""

    def __init__(self, store: Store, *, delay_s: float) -> None:
        super().__init__(store)
        self._delay_s = delay_s

    async def list(self) -> Listing:
        await asyncio.sleep(self._delay_s)
        return await super().list()

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        await asyncio.sleep(self._delay_s)
        return await super().open(name, nbytes)

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        await asyncio.sleep(self._delay_s)
        await super().read_into(meta, start, buffers)

    async def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        await asyncio.sleep(self._delay_s)
        return await super().read(name, max_bytes=max_bytes)


@dataclass(slots=True, eq=False)
class Gate:
    """The gate at which one read of a `GatedStore` waits."""

    name: str
    """Name of the object that is read."""
    start: int
    """Offset in the object of the first byte that is read."""
    nbytes: int
    """The number of bytes that are read."""
    is_open: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the read may go on."""

    def open(self) -> None:
        """Let the read go on."""
        self.is_open.set()


class GatedStore(WrapperStore):
    """A wrapper in which every `read_into` waits at a `Gate` until the test opens it.

    Parameters
    ----------
    is_stubborn : bool
        Whether a cancelled read still waits for its gate and then writes, like a thread that is in a system call.

    Attributes
    ----------
    gates : list of Gate
        The gates at which reads wait now, in the order in which the reads began.
    """

    def __init__(self, store: Store, *, is_stubborn: bool = False) -> None:
        super().__init__(store)
        self.gates: list[Gate] = []
        self._is_stubborn = is_stubborn
        self._is_open = False
        self._arrived = asyncio.Event()

    async def waiting(self, count: int) -> list[Gate]:
        """Wait until at least `count` reads wait at their gates; return all gates at which a read waits."""
        while len(self.gates) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return list(self.gates)

    def open_all(self) -> None:
        """Open every gate, and let all later reads pass without one."""
        self._is_open = True
        for gate in self.gates:
            gate.open()

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        if self._is_open:
            await super().read_into(meta, start, buffers)
            return
        gate = Gate(meta.name, start, sum(buffer.nbytes for buffer in buffers))
        self.gates.append(gate)
        self._arrived.set()
        try:
            if self._is_stubborn:
                await wait_to_end(asyncio.ensure_future(self._pass(gate, meta, start, buffers)))
            else:
                await self._pass(gate, meta, start, buffers)
        finally:
            self.gates.remove(gate)

    async def _pass(self, gate: Gate, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        await gate.is_open.wait()
        await super().read_into(meta, start, buffers)


@dataclass(frozen=True, slots=True)
class Fault:
    """The fault of one call of a `FaultyStore`: the call first fills bytes, then waits, then raises."""

    hang: asyncio.Event | None = None
    """Event for which the call waits; None for no wait."""
    after: int = 0
    """The number of bytes that a `read_into` with an error fills before it waits and fails."""
    error: Exception | None = None
    """Exception that the call raises. Without one the call goes on as usual."""


class FaultyStore(WrapperStore):
    """A wrapper that breaks the calls which a script names.

    Parameters
    ----------
    reads : mapping of int to Fault
        The fault of each broken `read_into`, by its number. Calls are numbered from 0 in the order in which they begin.
    opens : mapping of str to Fault
        The fault of each broken `open`, by the name of the object.
    """

    def __init__(
        self, store: Store, reads: Mapping[int, Fault] | None = None, opens: Mapping[str, Fault] | None = None
    ) -> None:
        super().__init__(store)
        self._reads = dict(reads or {})
        self._opens = dict(opens or {})
        self.reads_begun = 0
        """The number of calls of `read_into` that have begun."""

    async def open(self, name: str, nbytes: int) -> tuple[ObjectMeta, bytes]:
        await _suffer(self._opens.get(name, Fault()))
        return await super().open(name, nbytes)

    async def read_into(self, meta: ObjectMeta, start: int, buffers: Sequence[memoryview]) -> None:
        fault = self._reads.get(self.reads_begun, Fault())
        self.reads_begun += 1
        if fault.error is not None and fault.after:
            await super().read_into(meta, start, _first_bytes(buffers, fault.after))
        await _suffer(fault)
        await super().read_into(meta, start, buffers)


async def _suffer(fault: Fault) -> None:
    if fault.hang is not None:
        await fault.hang.wait()
    if fault.error is not None:
        raise fault.error


def _first_bytes(buffers: Sequence[memoryview], nbytes: int) -> Sequence[memoryview]:
    first = []
    for buffer in buffers:
        first.append(buffer.cast("B")[:nbytes])
        nbytes -= first[-1].nbytes
    return first
