"""All ways of loading that are timed, by their names."""

from __future__ import annotations

from bench.ways.asyncshard import ASYNCSHARD
from bench.ways.base import Way
from bench.ways.caches import CACHES
from bench.ways.ceilings import CEILINGS
from bench.ways.disk_cache import DISK_CACHE
from bench.ways.kernels import KERNELS
from bench.ways.peers import PEERS
from bench.ways.refreshes import REFRESHES
from bench.ways.s3 import S3
from bench.ways.s3_peers import S3_PEERS
from bench.ways.slices import SLICES

WAYS: dict[str, Way] = {
    **CEILINGS,
    **ASYNCSHARD,
    **PEERS,
    **KERNELS,
    **S3,
    **S3_PEERS,
    **CACHES,
    **DISK_CACHE,
    **REFRESHES,
    **SLICES,
}
