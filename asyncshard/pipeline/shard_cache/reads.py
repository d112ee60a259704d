"""Read a whole file, or one tensor of it, into the shard cache."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import BudgetError, NamesError
from asyncshard.pipeline.checkpoint.checkpoint import Selection
from asyncshard.pipeline.checkpoint.tied_tensor import TiedTensor, ties_of_file
from asyncshard.pipeline.memory.budget import charge_of
from asyncshard.pipeline.shard_cache.cache import CachedFile, ShardCache
from asyncshard.pipeline.shard_cache.tensors import ShardTensors
from asyncshard.pipeline.transfer.buffered import BufferedTransfer
from asyncshard.plan.items import ReadItem
from asyncshard.tasks.bounded import run_bounded
from asyncshard.tasks.threads import DaemonThreads


async def read_whole(
    transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, threads: DaemonThreads, selection: Selection
) -> ShardTensors:
    """Return all tensors of a pinned file; read them, unless they are in memory.

    Tensors that were read one by one are dropped. Names that the file's metadata ties to its tensors are included.

    Raises
    ------
    BudgetError
        The file exceeds the budget; or, in a strict cache, tensors in use leave no room for it.
    StoreError
    """
    if file.tensors is None:
        await threads.run(lambda: transfer.plan(cache.budget, is_strict=False))
        tensors = await _read_items(transfer, file, cache, transfer.items)
        file.tensors = tensors.with_ties(await threads.run(ties_of_file, transfer.checkpoint, selection))
        file.single_tensors.clear()
    return file.tensors


async def read_one(transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, name: str) -> ShardTensors:
    """Read one tensor of a pinned file; return a mapping with this tensor alone.

    Raises
    ------
    NamesError
        The file has no tensor of this name.
    BudgetError, StoreError
        As for `read_whole`.
    """
    header = transfer.checkpoint.shards[0].header
    index = header.table.find(name)
    if index < 0:
        raise unknown(file.shard.path, name)
    info = header.at(index)
    item = ReadItem(0, info.start, info.stop, index, index + 1)
    file.single_tensors[name] = tensors = await _read_items(transfer, file, cache, [item])
    return tensors


async def read_tied(
    transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, name: str, tied: TiedTensor
) -> ShardTensors:
    """Read a tensor that a pinned file holds under another name; return a mapping with the tensor under `name`.

    It shares the memory of the stored tensor, unless the tp plan has a rule of its own for `name`: then ``tied.alone``
    is what `transfer` reads.

    Raises
    ------
    BudgetError, StoreError
        As for `read_whole`.
    """
    if tied.alone is not None:
        return await read_one(transfer, file, cache, name)
    stored = file.with_name(tied.stored_name) or await read_one(transfer, file, cache, tied.stored_name)
    file.single_tensors[name] = tensors = stored.with_ties({name: tied.stored_name})
    return tensors


async def _read_items(
    transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, items: Sequence[ReadItem]
) -> ShardTensors:
    sizes = [transfer.buffer_bytes(item) for item in items]
    needed = file.account.header_bytes + sum(charge_of(size) for size in sizes if size)
    path = file.shard.path
    if needed > cache.budget.nbytes:
        raise _too_large(path, needed, cache.budget.nbytes)
    leases = iter(
        await file.account.allocate_all(
            [size for size in sizes if size], on_wait=lambda: cache.require_room(needed, path)
        )
    )
    buffers = [next(leases) if size else None for size in sizes]
    reads = (transfer.read(item, lease) for item, lease in zip(items, buffers, strict=True))
    await run_bounded(min(transfer.pacing.prefetch_count, len(items)), reads, on_failure="cancel")
    return ShardTensors(transfer, items, buffers)


def unknown(path: str, name: str) -> NamesError:
    """Return the error for a name that no tensor has."""
    return NamesError(f"{path}: there is no tensor {name!r}", path=path, missing=(name,))


def _too_large(path: str, needed: int, available: int) -> BudgetError:
    return BudgetError(
        f"{path}: what is to be read, and the header, take {needed:,} bytes, more than the memory budget of "
        f"{available:,} bytes; raise memory_budget_mb to {-(-needed >> 20)} or more, or ask for single tensors "
        "(get_tensor), or for all in turn (load_weights_incremental)",
        path=path,
        needed_bytes=needed,
        budget_bytes=available,
    )
