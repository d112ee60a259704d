"""Check a checkpoint: read the headers of all ranks, and report every problem at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asyncshard._core import WeightMap
from asyncshard.errors import AsyncShardError, CheckpointError
from asyncshard.format.header import Header
from asyncshard.format.index import MAX_INDEX_BYTES, parse_index
from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders.options import Options, require_int
from asyncshard.pipeline.checkpoint.config import CONFIG_NAME, read_config
from asyncshard.pipeline.checkpoint.header_scan import HeaderScan, is_about_the_file
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.memory.budget import MemoryBudget
from asyncshard.pipeline.memory.free_memory import default_budget_mb
from asyncshard.plan.check.file_facts import FileFacts, facts_of
from asyncshard.plan.check.judgement import CheckedFile, CheckInput, Problem, report_on
from asyncshard.plan.check.report import CheckpointReport
from asyncshard.plan.files.layout import INDEX_NAME
from asyncshard.plan.files.survey import Survey, survey_index, survey_names
from asyncshard.stores import Listing
from asyncshard.stores.opening import ModelPath
from asyncshard.tasks.yielding import yielding_gil


async def check_checkpoint(
    path: ModelPath,
    *,
    pattern: str | ShardPattern | None = None,
    world_size: int | None = None,
    memory_budget_mb: float | None = None,
    max_workers: int | None = None,
    max_header_bytes: int | None = None,
    max_tensors: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CheckpointReport:
    """Read the headers of all ranks of a checkpoint, and report its contents and every problem.

    Tensor data is not read. A damaged file does not stop the check: it is listed with its error. A few headers are read
    at a time, off the event loop. A header is dropped when it has been read; only a few bytes for each of its tensors
    are kept until the report is made.

    Parameters
    ----------
    path : str, path or Store
        A directory, a prefix or one file, as a local path or URL; or a store of your own, which stays open.
    pattern : str or ShardPattern, optional
        Names of rank shards; by default the names that loaders know, or a Hugging Face checkpoint.
    world_size : int, optional
        Number of ranks of the rank shards; by default the number that the names show. If the last rank has no file at
        all, the check finds that only if `world_size` is given.
    memory_budget_mb : float, optional
        MiB for the headers that are read at once; by default 2048, or a quarter of the free memory if that is less.
    max_workers, max_header_bytes, max_tensors, storage_options
        As for `ShardedStateLoader`.

    Returns
    -------
    CheckpointReport
        Its ``problems`` are sentences; ``is_ok`` says whether there are none, and ``is_complete`` whether loaders would
        load the checkpoint.

    Raises
    ------
    ObjectNotFoundError, AccessDeniedError
        There is no such path, or listing it is not allowed.
    BudgetError
        One header alone takes more than `memory_budget_mb`.
    StoreError
        The storage does not answer.
    TypeError, ValueError
        An argument is out of range.
    """
    options = Options().override(
        {
            "memory_budget_mb": memory_budget_mb,
            "max_workers": max_workers,
            "max_header_bytes": max_header_bytes,
            "max_tensors": max_tensors,
            "storage_options": storage_options,
        }
    )
    if world_size is not None:
        require_int("world_size", world_size, 1)
    shard_pattern = ShardPattern(pattern) if isinstance(pattern, str) else pattern
    budget = MemoryBudget(memory_budget_mb or default_budget_mb())
    async with Opening.of(path, options.access(), budget, threads=2) as opening:
        return await _Check(opening, options, shard_pattern, world_size).run()


class _Check:
    """One check of a checkpoint, which is open."""

    def __init__(
        self, opening: Opening, options: Options, pattern: ShardPattern | None, world_size: int | None
    ) -> None:
        self._store = opening.store
        self._threads = opening.threads
        self._memory_bytes = opening.account.budget.nbytes
        self._options = options
        self._pattern = pattern
        self._world_size = world_size
        self._problems: list[Problem] = []

    async def run(self) -> CheckpointReport:
        """List the files, read the index, ``config.json`` and all headers, and return the report."""
        listing = await self._store.list()
        survey = await self._threads.run(self._survey, listing)
        weight_map: WeightMap | None = None
        if survey.kind == "index":
            weight_map = await self._read_index()
            survey = await self._threads.run(self._survey, listing, weight_map)
        config = None
        if CONFIG_NAME in listing.names and not listing.is_file:
            config = await self._read_config()
        files = await self._read_headers(survey, weight_map)
        check_input = CheckInput(self._store.url, survey, files, config, self._pattern, tuple(self._problems))
        return await self._threads.run(report_on, check_input)

    def _survey(self, listing: Listing, weight_map: WeightMap | None = None) -> Survey:
        if weight_map is not None:
            return survey_index(weight_map.files, listing.names, path=self._store.url)
        names = listing.names
        if self._problems:  # the index cannot be read: survey the other names as if there were none
            names = tuple(name for name in names if name != INDEX_NAME)
        return survey_names(
            names,
            path=self._store.url,
            is_file=listing.is_file,
            pattern=self._pattern,
            world_size=self._world_size,
        )

    async def _read_index(self) -> WeightMap | None:
        path = self._store.path_of(INDEX_NAME)
        try:
            # The thread gets the only reference, so that it frees a large index, and not the event loop.
            holder = [await self._store.read(INDEX_NAME, max_bytes=MAX_INDEX_BYTES)]
            return await self._threads.run(lambda: parse_index(holder.pop(), path=path))
        except AsyncShardError as error:
            self._note(error, is_fatal=True)
            return None

    async def _read_config(self) -> Mapping[str, Any] | None:
        """Return the value of ``config.json``; None if it cannot be read, or is no JSON object."""
        try:
            config = await read_config(self._store, self._threads)
        except CheckpointError as error:
            self._problems.append(Problem(f"{error}.", is_fatal=False))
            return None
        except AsyncShardError as error:
            self._note(error, is_fatal=False)
            return None
        return config if isinstance(config, Mapping) else None

    def _note(self, error: AsyncShardError, *, is_fatal: bool) -> None:
        if not is_about_the_file(error):
            raise error
        self._problems.append(Problem(f"{str(error).rstrip('.')}.", is_fatal))

    async def _read_headers(self, survey: Survey, weight_map: WeightMap | None) -> dict[str, CheckedFile]:
        options = self._options
        numbers = {} if weight_map is None else {name: number for number, name in enumerate(weight_map.files)}

        def keep(name: str, header: Header) -> FileFacts:
            return facts_of(name, header, yielding_gil(header), weight_map, numbers.get(name))

        names = [*survey.files, *survey.others]
        scan = HeaderScan(
            self._store, self._threads, keep, limits=options.header_limits, memory_bytes=self._memory_bytes
        )
        findings = await scan.run(names)
        return dict(zip(names, findings, strict=True))
