"""Stores for tests: one in memory, wrappers that delay, hold or break the reads of any store, and a conformance suite.

Subclass `StoreTests` to test a store of your own::

    class TestMyStore(StoreTests):
        async def make_store(self, files):
            return MyStore(files)
"""

from asyncshard.testing.conformance import StoreTests
from asyncshard.testing.fakes import Fault, FaultyStore, Gate, GatedStore, LatencyStore, MemoryStore, WrapperStore
from asyncshard.testing.seaweedfs import RunningServer, seaweedfs

__all__ = [
    "Fault",
    "FaultyStore",
    "Gate",
    "GatedStore",
    "LatencyStore",
    "MemoryStore",
    "RunningServer",
    "StoreTests",
    "WrapperStore",
    "seaweedfs",
]
