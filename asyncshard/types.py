"""Types for annotations: public signatures name them, and ``asyncshard`` itself does not export them.

Stores are in `asyncshard.stores`, errors in `asyncshard.errors`, events in `asyncshard.events`.
"""

from asyncshard.arrays.base import ArrayLibrary, RawArray
from asyncshard.format.header import HeaderLimits
from asyncshard.format.pattern import ShardName
from asyncshard.loaders.incremental import Callback
from asyncshard.loaders.loader import Loader, LoadReport
from asyncshard.loaders.options import CommonTuning, KeywordTuning, Options, ReadTuning, Tuning
from asyncshard.loaders.sources import ShardFile
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.load_plan import FilePlan, LoadPlan
from asyncshard.pipeline.checkpoint.version import ShardVersion
from asyncshard.pipeline.memory.budget import Account, Reclaimable, Reclaimer
from asyncshard.pipeline.shard_cache.tensors import ShardTensors
from asyncshard.pipeline.writing.reshard.reshard import ReshardReport
from asyncshard.plan.check.report import CheckpointReport, DamagedFile, DtypeUse, RankFiles, Tie
from asyncshard.plan.division.placements import Placement
from asyncshard.plan.tensor_filter import NameFilterSpec, TensorFilter
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.disk_cache.report import CacheReport
from asyncshard.stores.opening import ModelPath, StoreAccess

__all__ = [
    "Account",
    "ArrayLibrary",
    "CacheReport",
    "Callback",
    "CheckpointReport",
    "CommonTuning",
    "DamagedFile",
    "DtypeUse",
    "FilePlan",
    "HeaderLimits",
    "KeywordTuning",
    "LoadPlan",
    "LoadReport",
    "Loader",
    "ModelPath",
    "NameFilterSpec",
    "Options",
    "Placement",
    "RankFiles",
    "RawArray",
    "ReadTuning",
    "Reclaimable",
    "Reclaimer",
    "ReshardReport",
    "Selection",
    "ShardFile",
    "ShardName",
    "ShardTensors",
    "ShardVersion",
    "StoreAccess",
    "TensorFilter",
    "Tie",
    "TpPlan",
    "Tuning",
]
