"""The tuning options that every loader takes: their meanings, checks, and inheritance from a base loader."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

from asyncshard.arrays.frameworks import FRAMEWORKS
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.plan.items import GRAIN
from asyncshard.stores.opening import StoreAccess

if TYPE_CHECKING:
    from asyncshard.stores.disk_cache.directory import DiskCache

"""1 MiB has 1,048,576 bytes."""
_ORDERS = ("plan", "completion")


class CommonTuning(TypedDict, total=False):
    """The options that every loader takes as keywords. `Options` explains them; None means the default."""

    budget: MemoryBudget | None
    chunk_size: int | None
    framework: Literal["np", "pt"] | None
    page_cache: Literal["keep", "drop"] | None
    strict_budget: bool | None
    order: Literal["plan", "completion"] | None
    max_header_bytes: int | None
    max_tensors: int | None
    cache_dir: str | os.PathLike[str] | None
    cache_max_gb: float | None
    storage_options: Mapping[str, Any] | None


class KeywordTuning(CommonTuning, total=False):
    """The common options, and the size of the memory budget."""

    memory_budget_mb: float | None


class ReadTuning(CommonTuning, total=False):
    """The common options, and the numbers of concurrent reads."""

    prefetch_count: int | None
    max_workers: int | None


class Tuning(KeywordTuning, ReadTuning, total=False):
    """All tuning options, for type checkers."""


@dataclass(frozen=True, slots=True)
class Options:
    """The tuning options of a loader. For an option that is None, the default is chosen when a load begins."""

    memory_budget_mb: float | None = None
    """Size of the memory budget in MiB; by default 2048, or a quarter of the free memory if that is less."""
    budget: MemoryBudget | None = None
    """A memory budget that is shared with other loaders; by default the loader has a budget of its own."""
    prefetch_count: int | None = None
    """The number of read items that are read ahead of the consumer; by default the store's number. Reading ahead also
    stops at 8 MiB in buffers for each of them."""
    max_workers: int | None = None
    """The number of reads in flight; by default the store's number."""
    chunk_size: int | None = None
    """The largest number of bytes of one read; smaller tensors are read together up to it. By default the store's
    number."""
    framework: str = "np"
    """The library of the tensors: "np" for NumPy arrays, "pt" for torch tensors."""
    page_cache: str = "keep"
    """Whether the kernel keeps local files in its page cache after they were read: "keep" or "drop"."""
    strict_budget: bool = False
    """Whether BudgetError is raised instead of letting tensors that the consumer keeps leave the budget."""
    order: str = "plan"
    """The order in which tensors are delivered: "plan", or "completion" for the order in which the reads complete."""
    max_header_bytes: int | None = None
    """A file with a larger header is an error; by default the limit of the format, 100,000,000 bytes."""
    max_tensors: int | None = None
    """A file with more tensors is an error; by default there is no limit."""
    cache_dir: str | os.PathLike[str] | None = None
    """The directory of a disk cache, which keeps remote objects when they are read. All processes of the machine may
    share it."""
    cache_max_gb: float | None = None
    """Size of the disk cache in GiB; by default 100. Above it, the objects that were used longest ago are removed."""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # it may hold secrets
    """Arguments for the constructor of the store."""

    def __post_init__(self) -> None:
        for name, least in (("prefetch_count", 1), ("chunk_size", GRAIN)):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), least)
        for name in ("max_workers", "max_header_bytes", "max_tensors"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        _require_one_of("framework", self.framework, tuple(FRAMEWORKS))
        _require_one_of("page_cache", self.page_cache, ("keep", "drop"))
        _require_one_of("order", self.order, _ORDERS)
        if not isinstance(self.strict_budget, bool):
            raise TypeError(f"strict_budget must be True or False, not {self.strict_budget!r}")
        if self.budget is not None and not isinstance(self.budget, MemoryBudget):
            raise TypeError(f"budget must be a MemoryBudget, not {self.budget!r}")
        if self.budget is not None and self.memory_budget_mb is not None:
            raise ValueError("pass either memory_budget_mb or budget, not both")
        if self.memory_budget_mb is not None:
            MemoryBudget(self.memory_budget_mb)  # checks it
        if self.cache_dir is not None and (not isinstance(self.cache_dir, str | os.PathLike) or not self.cache_dir):
            raise TypeError(f"cache_dir must be a path of str, not {self.cache_dir!r}")
        if self.cache_max_gb is not None:
            _require_positive("cache_max_gb", self.cache_max_gb)
            if self.cache_dir is None:
                raise ValueError("cache_max_gb bounds a cache: pass cache_dir too")
        if not isinstance(self.storage_options, Mapping):
            raise TypeError(f"storage_options must be a mapping, not a {type(self.storage_options).__name__}")
        object.__setattr__(self, "storage_options", dict(self.storage_options))  # the caller may change the mapping

    def override(self, values: Mapping[str, Any]) -> Self:
        """Return these options, with the values that are not None in place of the old ones.

        Raises
        ------
        TypeError
            An option does not exist.
        """
        unknown = sorted(set(values) - set(Options.__dataclass_fields__))
        if unknown:
            raise TypeError(
                f"unknown option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
                f"loaders take {', '.join(Options.__dataclass_fields__)}"
            )
        changes = {name: value for name, value in values.items() if value is not None}
        if "budget" in changes and "memory_budget_mb" not in changes:
            changes["memory_budget_mb"] = None
        elif "memory_budget_mb" in changes and "budget" not in changes:
            changes["budget"] = None
        return replace(self, **changes)

    @property
    def header_limits(self) -> HeaderLimits:
        """The limits of a file's header."""
        return HeaderLimits(self.max_header_bytes, self.max_tensors)

    def access(self, cache: DiskCache | None = None, write_buffer_bytes: int = 0) -> StoreAccess:
        """Return how stores are opened with these options, and through a disk cache if one is given."""
        return StoreAccess(self.max_workers, self.page_cache, self.storage_options, cache, write_buffer_bytes)


def require_int(name: str, value: Any, least: int) -> None:
    """Raise TypeError or ValueError unless the value is an int of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value}")


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, not {value!r}")


def _require_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")
