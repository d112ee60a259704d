"""Tools for tests: a store in memory, wrappers that delay, hold or break the reads of any store, a conformance suite
for stores, and an S3 server that makes the errors which a test scripts.

Subclass `StoreTests` to test a store of your own::

    class TestMyStore(StoreTests):
        async def make_store(self, files):
            return MyStore(files)
"""

from asyncshard.stores.wrapper import WrapperStore
from asyncshard.testing.conformance import StoreTests
from asyncshard.testing.fakes import Fault, FaultyStore, Gate, GatedStore, LatencyStore, MemoryStore
from asyncshard.testing.s3_request import S3Fault, S3Request
from asyncshard.testing.s3_server import S3Server
from asyncshard.testing.seaweedfs import RunningServer, seaweedfs

__all__ = [
    "Fault",
    "FaultyStore",
    "Gate",
    "GatedStore",
    "LatencyStore",
    "MemoryStore",
    "RunningServer",
    "S3Fault",
    "S3Request",
    "S3Server",
    "StoreTests",
    "WrapperStore",
    "seaweedfs",
]
