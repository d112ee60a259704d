"""A reshard from its first look at the source to the last file in its place."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncshard._core import HeaderTable, StopFlag
from asyncshard._typing import Int64Array
from asyncshard.errors import CheckpointError
from asyncshard.format.pattern import ShardPattern
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint, Selection
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.checkpoint.slicing import find_plan
from asyncshard.pipeline.checkpoint.ties import place_ties, ties_with_rules
from asyncshard.pipeline.memory.scratch import charge_scratch
from asyncshard.pipeline.writing.reshard.block_copy import Copy
from asyncshard.pipeline.writing.reshard.block_reader import BlockBuffers, BlockReader, take_block_buffers
from asyncshard.pipeline.writing.reshard.companions import companion_files, copy_companions
from asyncshard.pipeline.writing.reshard.divider import PlaceTensor
from asyncshard.pipeline.writing.reshard.plan import TargetPlan, plan_target
from asyncshard.pipeline.writing.reshard.replicas import Comparison, compare_digests
from asyncshard.pipeline.writing.reshard.source import Source, join_source, open_source
from asyncshard.pipeline.writing.reshard.target import Target, index_text
from asyncshard.pipeline.writing.reshard.written_placements import has_placements
from asyncshard.plan.files.layout import INDEX_NAME, SINGLE_NAME
from asyncshard.plan.files.survey import Survey, survey_names
from asyncshard.plan.text import Problems
from asyncshard.plan.tp.models import require_known
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.stores.ranges import Scratch
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.yielding import yielding_gil

WRITERS = 1
"""Threads that gather and write: with two or three it was no faster on two cores, and the event loop waited longer."""
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """The result of a reshard."""

    files: tuple[str, ...]
    """Full paths of the weights' files, and of the index where there is one, in order of rank and part."""
    tensors: int
    """Tensors of the checkpoint; each rank has all or a part of each."""
    bytes_read: int
    """Bytes of tensor data that were read to be copied."""
    bytes_written: int
    """Bytes of tensor data that were written."""
    bytes_compared: int
    """Bytes that were read before the copy, to compare the tensors that several ranks hold."""


@dataclass(frozen=True, slots=True)
class ReshardRequest:
    """The arguments of a reshard."""

    world_size: int
    max_shard_size: int
    is_ranks: bool
    pattern: ShardPattern | None
    tp_plan: TpPlan | Literal["auto"] | None
    chunk_size: int | None


class Reshard:
    """The steps of one reshard: look, check, copy, put in place."""

    def __init__(self, opening: Opening, target: Target, wanted: ReshardRequest) -> None:
        self._store = opening.store
        self._threads = opening.threads
        self._account = opening.account
        self._target = target
        self._wanted = wanted

    async def run(self) -> ReshardReport:
        names, source = await self._open()
        plan = await self._plan(source)
        self._account.charge_headers(source.side.nbytes + plan.nbytes, self._store.url)
        chunk_size = self._wanted.chunk_size or min(self._store.pacing.chunk_size, _BLOCK_BYTES)
        reader = BlockReader(self._store, source.shards, self._threads, self._scratch(source, chunk_size))
        rooms = await take_block_buffers(self._account, chunk_size)
        bytes_compared = await self._compare(source, reader, rooms)
        others = companion_files(names)
        files = [file.name for file in plan.files.files]
        await self._threads.run(self._target.begin, [*others, *files])
        # Before the weights, which may take an hour: one that cannot be read ends the run now.
        others = await copy_companions(self._store, others, self._target, rooms[0].memory, self._threads)
        copy = await self._copy(source, plan, reader, rooms)
        if not plan.is_ranks and files != [SINGLE_NAME]:
            await self._threads.run(self._write_index, source, plan)
            files.append(INDEX_NAME)
        flushes = (self._threads.run(self._target.flush, name) for name in [*others, *files])
        await run_bounded(WRITERS, flushes, on_failure="finish")
        await self._threads.run(self._target.commit, [*others, *files])
        return ReshardReport(
            tuple(os.path.join(self._target.directory, name) for name in files),
            len(source.tensors.rows),
            copy.bytes_read,
            copy.bytes_written,
            bytes_compared,
        )

    def _scratch(self, source: Source, chunk_size: int) -> Scratch:
        # A single rank has every byte of its files.
        is_covering = self._store.pacing.max_gap_bytes > 0 and source.side.world_size > 1
        if self._store.has_own_scratch or not is_covering:
            return Scratch(self._threads, chunk_size, 1)
        return charge_scratch(self._account, self._threads, chunk_size=chunk_size, path=self._store.url)

    async def _open(self) -> tuple[Sequence[str], Source]:
        """Return the names beside the weights too."""
        url, pattern = self._store.url, self._wanted.pattern
        listing = await self._store.list()

        def look() -> tuple[Survey, ShardPattern | None]:
            survey = survey_names(listing.names, path=url, is_file=listing.is_file, pattern=pattern)
            if pattern is None or survey.kind == "ranks":
                return survey, pattern
            return survey_names(listing.names, path=url, is_file=listing.is_file), None  # the pattern is the target's

        survey, found = await self._threads.run(look)
        checkpoints = await open_source(self._store, survey, found, self._threads, self._account)
        source = await self._join(checkpoints, is_ranks=survey.kind == "ranks")
        return (() if listing.is_file else listing.names), source

    async def _join(self, checkpoints: Sequence[Checkpoint], *, is_ranks: bool) -> Source:
        url, plan = self._store.url, self._wanted.tp_plan
        if isinstance(plan, TpPlan):
            await self._check(plan, checkpoints[0], is_ranks=is_ranks)
        place = None
        if is_ranks and not await self._threads.run(has_placements, checkpoints[0]):
            place = await self._find_plan(len(checkpoints), checkpoints[0].shards)
        return await self._threads.run(lambda: join_source(checkpoints, place, path=url, is_ranks=is_ranks))

    async def _check(self, plan: TpPlan, first: Checkpoint, *, is_ranks: bool) -> None:
        """Check a plan against the names of the first rank: tied tensors stay one, so they must be divided alike."""
        url, tables = self._store.url, _tables(first.shards)
        ties = await ties_with_rules(self._store, first, tables, plan, self._threads)
        await self._threads.run(lambda: plan.check(tables, ties, path=url, yielding_gil=yielding_gil))
        if ties and not is_ranks:
            selection = Selection(world_size=self._wanted.world_size)
            tied = await self._threads.run(next, place_ties(first, ties, selection, plan), None)
            if tied is not None:
                raise CheckpointError(
                    f"{url}: {tied.name!r} is tied to {tied.stored_name!r}, and the tp_plan divides them differently: "
                    "reshard keeps tied tensors one. Leave the rule for the former out; a load may still have it",
                    path=url,
                    tensor=tied.name,
                )

    async def _plan(self, source: Source) -> TargetPlan:
        wanted, url = self._wanted, self._store.url
        place = await self._find_plan(wanted.world_size, source.tensors.shards) if wanted.is_ranks else None
        if place is None and wanted.world_size > 1 and not source.is_ranks:
            raise CheckpointError(
                f"{url}: how its tensors are to be divided among {wanted.world_size} ranks is not known: pass a "
                "tp_plan, or tp_plan='auto' for the models that it knows",
                path=url,
            )
        return await self._threads.run(
            lambda: plan_target(
                source,
                place,
                world_size=wanted.world_size,
                max_shard_size=wanted.max_shard_size,
                pattern=(wanted.pattern or ShardPattern()) if wanted.is_ranks else None,
                path=url,
            )
        )

    async def _find_plan(self, world_size: int, first: Sequence[OpenedFile]) -> PlaceTensor | None:
        """Return how the tensors, which the first rank's shards name, are divided among as many ranks."""
        selection = Selection(tp_plan=self._wanted.tp_plan, world_size=world_size)
        plan = await find_plan(self._store, selection, self._threads)
        if plan is not None and self._wanted.tp_plan == "auto":
            await self._threads.run(
                lambda: require_known(plan, plan.samples(_tables(first), yielding_gil), path=self._store.url)
            )
        return None if plan is None else plan.placement_of

    async def _compare(self, source: Source, reader: BlockReader, rooms: Sequence[BlockBuffers]) -> int:
        """Check that what several ranks hold alike is alike; return the bytes that were read for it."""
        faults = Problems(self._store.url)
        comparison = Comparison(reader, self._threads, faults)
        for copies in await self._threads.run(compare_digests, source, faults):
            await comparison.run(copies, rooms)
        faults.require_none()
        return comparison.bytes_compared

    async def _copy(self, source: Source, plan: TargetPlan, reader: BlockReader, rooms: Sequence[BlockBuffers]) -> Copy:
        stop = StopFlag()
        sizes = await self._threads.run(self._write_headers, plan, stop, on_cancel=stop.set)
        side = await self._threads.run(plan.side, sizes)
        copy = Copy(reader, source, self._target, side, plan.files, self._threads)
        await copy.run(rooms)
        return copy

    def _write_headers(self, plan: TargetPlan, stop: StopFlag) -> Int64Array:
        sizes = np.zeros(len(plan.files.files), np.int64)
        for number, file in enumerate(plan.files.files):
            header = plan.header(number)
            self._target.write(file.name, 0, [memoryview(header)], stop)
            sizes[number] = len(header)
            if stop.is_set():
                break
        return sizes

    def _write_index(self, source: Source, plan: TargetPlan) -> None:
        self._target.write_text(INDEX_NAME, index_text(int(source.sizes.sum()), plan.weight_map()))


def _tables(shards: Sequence[OpenedFile]) -> list[HeaderTable]:
    return [shard.header.table for shard in shards]
