"""A load as it was asked for, and how its checkpoint is opened and its transfer planned.

Load ─► Opening ─► choose files ─► read headers ─► Delivery.plan ─► Transfer
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from asyncshard.arrays.base import ArrayLibrary
from asyncshard.arrays.frameworks import load_library
from asyncshard.events import Listener
from asyncshard.pipeline.checkpoint.checkpoint import Selection, open_checkpoint
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.checkpoint.slicing import open_sliced
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.transfer.transfer import Reading, Transfer
from asyncshard.stores.base import Store
from asyncshard.stores.opening import ModelPath, StoreAccess


@dataclass(frozen=True, slots=True)
class Load:
    """One load: which files of a checkpoint, how they are read, and within which budget."""

    path: ModelPath
    access: StoreAccess
    selection: Selection
    budget: MemoryBudget
    chunk_size: int | None
    """Bytes of one read at most; None for the store's own number."""
    prefetch_count: int | None
    """Read items ahead of the consumer; None for the store's own number."""
    framework: str
    """Which array library makes the tensors: "np" or "pt"."""
    is_strict: bool
    """Whether delivered tensors that stay alive are an error once they block the next one."""
    is_ordered: bool
    """Whether items are delivered in plan order, rather than as they complete."""

    @property
    def url(self) -> str:
        """The path or URL, for messages."""
        return self.path.url if isinstance(self.path, Store) else os.fspath(self.path)

    def open(self) -> Opening:
        """Return what the checkpoint is opened with; entered, it is open until the end of the ``async with``."""
        return Opening.of(self.path, self.access, self.budget)

    async def open_checkpoint(self, opening: Opening) -> OpenedCheckpoint:
        """Choose the files, read and validate their headers, and cut them to what the selection wants.

        Raises
        ------
        NamesError, ObjectNotFoundError, CheckpointError, FormatError, BudgetError, StoreError
        """
        store = opening.store
        pacing = store.pacing.override(self.chunk_size, self.prefetch_count)
        if self.selection.is_sliced:
            checkpoint = await open_sliced(
                store, self.selection, opening.threads, opening.account, chunk_size=pacing.chunk_size
            )
        else:
            checkpoint = await open_checkpoint(store, self.selection, opening.threads, opening.account)
        return OpenedCheckpoint(self, Reading(checkpoint, pacing, opening.threads))

    def library(self, destinations: Mapping[str, Any] | None = None) -> ArrayLibrary:
        """Return the array library; for a thread, since it may import a framework."""
        return load_library(self.framework, destinations)


class OpenedCheckpoint(NamedTuple):
    """A checkpoint whose headers have been read, for a delivery to plan its transfer."""

    load: Load
    reading: Reading


class Delivery(ABC):
    """Where the tensors of a load go: into buffers, new arrays, the caller's memory, or an update of live weights."""

    @abstractmethod
    async def plan(self, opened: OpenedCheckpoint) -> Transfer:
        """Plan the transfer; all that can be known to be wrong before tensors are read is raised here."""


@asynccontextmanager
async def open_transfer(
    load: Load, opening: Opening, delivery: Delivery, listener: Listener
) -> AsyncIterator[Transfer]:
    """Open the checkpoint of a load and plan its transfer, which may run until the end of the ``async with``.

    The store's events go to `listener` meanwhile.
    """
    async with opening:
        with opening.store.reporting_to(listener):
            yield await delivery.plan(await load.open_checkpoint(opening))
