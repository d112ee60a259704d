"""asyncshard loads model weights in the safetensors format into memory, within asyncio."""

from asyncshard import errors
from asyncshard._version import __version__
from asyncshard.arrays.memory import Sink
from asyncshard.arrays.subtensors import SubtensorFilter
from asyncshard.errors import AsyncShardError
from asyncshard.format.header import Header, TensorInfo, parse_header
from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders import load, stream
from asyncshard.loaders.cache import verify_cache
from asyncshard.loaders.check import check_checkpoint
from asyncshard.loaders.files import read_header
from asyncshard.loaders.incremental import IncrementalShardLoader
from asyncshard.loaders.reshard import reshard
from asyncshard.loaders.save import save_sharded_state
from asyncshard.loaders.sharded_state import ShardedStateLoader
from asyncshard.loaders.streaming import AsyncShardLoader
from asyncshard.pipeline.checkpoint.version import CheckpointVersion
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.refresh.update import Update
from asyncshard.pipeline.shard_cache.cache import CacheStatistics
from asyncshard.pipeline.transfer.statistics import Statistics
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.plan.assignment import compute_shard_assignment
from asyncshard.plan.division.chunks import ShardedTensor, validate_shard_shapes
from asyncshard.plan.division.placements import PackedShard, Replicate, Shard

__all__ = [
    "AsyncShardError",
    "AsyncShardLoader",
    "CacheStatistics",
    "CheckpointVersion",
    "Header",
    "IncrementalShardLoader",
    "MemoryBudget",
    "PackedShard",
    "Replicate",
    "Shard",
    "ShardPattern",
    "ShardedStateLoader",
    "ShardedTensor",
    "Sink",
    "Statistics",
    "Stream",
    "SubtensorFilter",
    "TensorInfo",
    "Update",
    "__version__",
    "check_checkpoint",
    "compute_shard_assignment",
    "errors",
    "load",
    "parse_header",
    "read_header",
    "reshard",
    "save_sharded_state",
    "stream",
    "validate_shard_shapes",
    "verify_cache",
]
