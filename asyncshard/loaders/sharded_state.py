"""Load the files of one rank."""

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
    """Which files are mine, how they are reached, and loading them into a state dict.

    A path names a directory of rank shards (only this rank's files are opened), a Hugging Face directory
    (``model.safetensors.index.json``, or one ``model.safetensors``), or one file.

    Parameters
    ----------
    pattern : str or ShardPattern, optional
        Names of rank shards; by default ``model-rank-{rank}-part-{part}.safetensors`` and vLLM's names for pipeline
        parallel ranks.
    rank, world_size : int
        Which rank of how many.
    pp_rank : int
        The pipeline-parallel rank, for patterns that have one.
    tp_plan : mapping of str to placement, TpPlan, or "auto", optional
        How the tensors of a checkpoint that was not cut for ranks are divided among them: this rank's slices are
        loaded. "auto" takes our own plan for the model that ``config.json`` names.
    unmatched : {"replicate", "error"}
        What becomes of tensors that no rule of a mapping matches.
    tensor_filter : str, iterable of str, or callable, optional
        Which tensors are wanted: names, globs, or a predicate of a name. Others are not read, and files of an index
        without a wanted one are not opened.
    **tuning
        See `Options`.

    Raises
    ------
    ValueError
        A rank outside the world, a pattern without its placeholders, or an option out of range.
    TypeError
        An option that does not exist.
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

    def __repr__(self) -> str:
        return f"ShardedStateLoader(rank={self._selection.rank}, world_size={self._selection.world_size})"

    async def discover_shards(self, path: ModelPath) -> list[str]:
        """Return the full paths of the files to load, in delivery order: parts by number, 2 before 10.

        Raises
        ------
        ObjectNotFoundError
            Nothing there, or no file for this rank; the message says which ranks are there.
        CheckpointError
            A gap in the parts, a rank outside the world, or a file that the index names and the directory lacks.
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
        """Load all of this rank's tensors, into `state_dict` in place, or as a dict of new ones.

        Bytes go straight into the arrays' own memory: no other copy, and no budget for contiguous ones. A tensor that
        is smaller than its array fills its first corner, with a warning. What does not fit raises before a byte is
        written. A read error, or a cancel, leaves the arrays partly written; the exception's ``filled`` and ``torn``
        say which are whole and which are not.

        Parameters
        ----------
        path : str, path or Store
            A local path or URL.
        state_dict : mapping of str to array, tensor or Sink, optional
            Destinations: NumPy arrays or torch tensors, views and strided ones too.
        strict : bool
            Raise when names are missing or unexpected. Otherwise they are logged, and unexpected ones are not read.
            `last_report` lists them.
        cast : bool
            Convert differing dtypes, through buffers of the budget.

        Returns
        -------
        mapping
            `state_dict`, or the new dict, which the caller owns and which does not count against the budget.

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
