"""A load: its arguments, how its checkpoint is opened, and how its transfer is planned.

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
    """The arguments of one load: the files of a checkpoint, how they are read, and the memory budget."""

    path: ModelPath
    """A local path or URL, or a store of the user's own."""
    access: StoreAccess
    """How stores are opened."""
    selection: Selection
    """The wanted files and tensors."""
    budget: MemoryBudget
    """The budget for all memory of the load."""
    chunk_size: int | None
    """The largest number of bytes of one read; None for the store's default."""
    prefetch_count: int | None
    """The number of read items that are read ahead of the consumer; None for the store's default."""
    framework: str
    """The array library that makes the tensors: "np" or "pt"."""
    is_strict: bool
    """Whether it is an error if delivered tensors that stay alive leave no memory for the next one."""
    is_ordered: bool
    """Whether items are delivered in plan order, rather than in the order in which their reads complete."""

    @property
    def url(self) -> str:
        """The path or URL, for messages."""
        return self.path.url if isinstance(self.path, Store) else os.fspath(self.path)

    def open(self) -> Opening:
        """Return the opening of the checkpoint: its store, threads, and account of the budget."""
        return Opening.of(self.path, self.access, self.budget)

    async def open_checkpoint(self, opening: Opening) -> OpenedCheckpoint:
        """Choose the files, read and validate their headers, and slice them as the selection says.

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
        """Return the array library. It may import a framework: call it in a thread."""
        return load_library(self.framework, destinations)


class OpenedCheckpoint(NamedTuple):
    """A load and its checkpoint, whose headers have been read. A delivery plans the transfer from it."""

    load: Load
    reading: Reading


class Delivery(ABC):
    """How the tensors of a load are delivered.

    They are delivered in buffers, in new arrays, in the caller's memory, or in an update of live weights.
    """

    @abstractmethod
    async def plan(self, opened: OpenedCheckpoint) -> Transfer:
        """Plan the transfer. Every error that can be found before tensor data is read is raised here."""


@asynccontextmanager
async def open_transfer(
    load: Load, opening: Opening, delivery: Delivery, listener: Listener
) -> AsyncIterator[Transfer]:
    """Open the checkpoint of a load, and plan its transfer. The checkpoint is closed at the end of the ``async with``.

    Until then `listener` gets the store's events.
    """
    async with opening:
        with opening.store.reporting_to(listener):
            yield await delivery.plan(await load.open_checkpoint(opening))
