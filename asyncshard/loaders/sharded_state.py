"""The loader of one rank's tensors into a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Unpack, overload

from asyncshard.format.pattern import ShardPattern
from asyncshard.loaders.loader import Loader
from asyncshard.loaders.options import Options, Tuning
from asyncshard.pipeline.checkpoint.checkpoint import Selection, choose_files
from asyncshard.pipeline.checkpoint.opening import Opening
from asyncshard.pipeline.transfer.buffered import ToBuffers
from asyncshard.pipeline.transfer.placed import ToDestinations
from asyncshard.pipeline.transfer.stream import Stream
from asyncshard.plan.files.layout import validate_rank
from asyncshard.plan.tensor_filter import NameFilterSpec, TensorFilter
from asyncshard.plan.tp.plan import TpPlan, plan_of
from asyncshard.stores.opening import ModelPath

StateDict = TypeVar("StateDict", bound=Mapping[str, Any])


class ShardedStateLoader(Loader):
    """Loads the tensors of one rank into a state dict, or as a dict of new tensors.

    A path may name a directory of rank shards (only this rank's files are opened), a Hugging Face directory
    (``model.safetensors.index.json``, or one ``model.safetensors``), or one file.

    Parameters
    ----------
    pattern : str or ShardPattern, optional
        Names of rank shards; by default ``model-rank-{rank}-part-{part}.safetensors``, and vLLM's names for
        pipeline-parallel ranks.
    rank, world_size : int
        The rank, counted from 0, and the number of ranks.
    pp_rank : int
        The pipeline-parallel rank, for patterns that have one.
    tp_plan : mapping of str to placement, TpPlan, or "auto", optional
        How the tensors of a checkpoint that was not cut for ranks are divided among ranks: the loader reads this rank's
        slices. "auto" takes asyncshard's plan for the model in ``config.json``.
    unmatched : {"replicate", "error"}
        Whether a tensor that no rule of a mapping matches is loaded whole by every rank, or is an error.
    tensor_filter : str, iterable of str, or callable, optional
        The tensors that are wanted: names, globs, or a predicate of a name. Other tensors are not read, and files of an
        index without a wanted tensor are not opened.
    **tuning
        Further options: see `Options`.

    Raises
    ------
    ValueError
        The rank is not below the world size, the pattern lacks a placeholder, or an option is out of range.
    TypeError
        An option does not exist.
    """

    def __init__(
        self,
        pattern: str | ShardPattern | None = None,
        rank: int = 0,
        world_size: int = 1,
        *,
        pp_rank: int = 0,
        tp_plan: Mapping[str, Any] | TpPlan | Literal["auto"] | None = None,
        unmatched: Literal["replicate", "error"] = "replicate",
        tensor_filter: NameFilterSpec | None = None,
        **tuning: Unpack[Tuning],
    ) -> None:
        validate_rank(rank, world_size, pp_rank)
        options = Options().override(tuning)
        selection = Selection(
            pattern=ShardPattern(pattern) if isinstance(pattern, str) else pattern,
            rank=rank,
            world_size=world_size,
            pp_rank=pp_rank,
            limits=options.header_limits,
            tp_plan=plan_of(tp_plan, unmatched),
            tensor_filter=None if tensor_filter is None else TensorFilter(tensor_filter),
        )
        super().__init__(selection, options)

    async def discover_shards(self, path: ModelPath) -> list[str]:
        """Return the full paths of the files to load, in delivery order: parts are ordered by number, 2 before 10.

        Raises
        ------
        ObjectNotFoundError
            There is no checkpoint, or no file of this rank; the message says which ranks have files.
        CheckpointError
            A part is missing, a file's rank is not below the world size, or the index names a file that does not exist.
        """
        async with Opening.of(path, self.access, self.budget) as opening:
            found = await choose_files(opening.store, self._selection, opening.threads)
            return [opening.store.path_of(name) for name in found.files]

    @overload
    async def load_weights(
        self, path: ModelPath, state_dict: None = None, strict: bool = ..., cast: bool = ...
    ) -> dict[str, Any]: ...

    @overload
    async def load_weights(
        self, path: ModelPath, state_dict: StateDict, strict: bool = ..., cast: bool = ...
    ) -> StateDict: ...

    async def load_weights(
        self, path: ModelPath, state_dict: Any = None, strict: bool = True, cast: bool = False
    ) -> Any:
        """Load all tensors of this rank, into the arrays of `state_dict`, or as a dict of new ones.

        Bytes are read straight into the memory of the arrays, without another copy; contiguous arrays need no memory of
        the budget. A tensor that is smaller than its array fills the array's first corner, with a warning. If a tensor
        does not fit its array, an error is raised before a byte is written. A read error or a cancel leaves the arrays
        partly written: the exception's attributes ``filled`` and ``torn`` name the arrays that are complete, and those
        that are partly written.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL, or a store of your own, which stays open.
        state_dict : mapping of str to array, tensor or Sink, optional
            The destinations: NumPy arrays, torch tensors, and sinks. Arrays may be views, and may be strided.
        strict : bool
            Whether missing or unexpected names are an error. Otherwise they are logged, and unexpected tensors are not
            read. `last_report` lists them.
        cast : bool
            Whether elements are converted to the array's dtype if it differs, through buffers of the budget.

        Returns
        -------
        mapping
            `state_dict`, or a new dict, which the caller owns and which does not count against the budget.

        Raises
        ------
        NamesError, DestinationError, CheckpointError, FormatError, BudgetError, StoreError
        """
        if state_dict is None:
            return await self._load_new(path)
        await self._fill(path, ToDestinations(state_dict, strict=strict, cast=cast))
        return state_dict

    def iterate_weights(self, path: ModelPath) -> Stream:
        """Return a stream over this rank's tensors: ``async for name, tensor in loader.iterate_weights(path)``."""
        return Stream(self._load(path), ToBuffers())
