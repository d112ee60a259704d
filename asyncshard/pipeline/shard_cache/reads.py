"""Read a file, or one tensor of it, into memory of its account in a cache."""

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
    """Read all tensors of a file, which is pinned, unless they are there; they replace those read one by one.

    What the file's metadata ties to one of them is among them.

    Raises
    ------
    BudgetError
        The file exceeds the budget; or, where that is strict, what is in use leaves it no room.
    StoreError
    """
    if file.tensors is None:
        await threads.run(lambda: transfer.plan(cache.budget, is_strict=False))
        tensors = await _read_items(transfer, file, cache, transfer.items)
        file.tensors = tensors.with_ties(await threads.run(ties_of_file, transfer.checkpoint, selection))
        file.lone.clear()
    return file.tensors


async def read_one(transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, name: str) -> ShardTensors:
    """Read one tensor of a file, which is pinned; return a mapping of just that.

    Raises
    ------
    NamesError
        There is no such tensor.
    BudgetError, StoreError
        As for `read_whole`.
    """
    header = transfer.checkpoint.shards[0].header
    index = header.table.find(name)
    if index < 0:
        raise unknown(file.shard.path, name)
    info = header.at(index)
    item = ReadItem(0, info.start, info.stop, index, index + 1)
    file.lone[name] = tensors = await _read_items(transfer, file, cache, [item])
    return tensors


async def read_tied(
    transfer: BufferedTransfer, file: CachedFile, cache: ShardCache, name: str, tied: TiedTensor
) -> ShardTensors:
    """Read one tensor of a file, which is pinned, that the file holds under another name; return a mapping that has it.

    It is the stored tensor, in the same memory, unless it is divided by itself; `transfer` is of that then.

    Raises
    ------
    BudgetError, StoreError
        As for `read_whole`.
    """
    if tied.alone is not None:
        return await read_one(transfer, file, cache, name)
    stored = file.with_name(tied.stored_name) or await read_one(transfer, file, cache, tied.stored_name)
    file.lone[name] = tensors = stored.with_ties({name: tied.stored_name})
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
    placed = [(item, next(leases) if size else None) for item, size in zip(items, sizes, strict=True)]
    reads = (transfer.read(item, lease) for item, lease in placed)
    await run_bounded(min(transfer.pacing.prefetch_count, len(placed)), reads, on_failure="cancel")
    return ShardTensors(transfer, items, [lease for _, lease in placed])


def unknown(path: str, name: str) -> NamesError:
    """Return the error for a tensor that is not there."""
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
