"""How rank shards are divided, as their own metadata says."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import FormatError
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.plan.division.placement_text import PLACEMENT_KEY, parse_placements, parse_world_size
from asyncshard.plan.division.placements import Placement, Replicate
from asyncshard.plan.text import Problems
from asyncshard.tasks.yielding import yielding_gil


def has_placements(checkpoint: Checkpoint) -> bool:
    """Return whether a rank's files say how they are divided."""
    return any(PLACEMENT_KEY in shard.header.metadata for shard in checkpoint.shards)


def written_placements(checkpoints: Sequence[Checkpoint], faults: Problems) -> dict[str, Placement] | None:
    """Return what the files say, or None where they say nothing."""
    shards = [shard for checkpoint in checkpoints for shard in checkpoint.shards]
    silent = [shard.path for shard in shards if PLACEMENT_KEY not in shard.header.metadata]
    if len(silent) == len(shards):
        return None
    for path in silent:
        faults.add(f"{path} has no metadata {PLACEMENT_KEY!r}, and other files of the checkpoint have it")
    first: dict[str, Placement] = {}
    known: dict[str, Placement] = {}
    worlds: set[int] = set()
    for rank, checkpoint in enumerate(checkpoints):
        own: dict[str, Placement] = {}
        for shard in checkpoint.shards:
            metadata = shard.header.metadata
            try:
                text = metadata.get(PLACEMENT_KEY, "{}")
                own.update(yielding_gil(parse_placements(text, path=shard.path, known=known)))
                world_size = parse_world_size(metadata, path=shard.path)
            except FormatError as error:
                faults.add(str(error))
                continue
            if world_size is not None:
                worlds.add(world_size)
        if rank == 0:
            first = own
            continue
        # One by one: the comparison of two dicts would hold the GIL to its end.
        wrong = [name for name, placement in yielding_gil(own.items()) if first.get(name) != placement]
        wrong += [name for name in yielding_gil(first) if name not in own]
        for name in sorted(wrong):
            faults.add(
                f"tensor {name!r} is placed by {first.get(name, Replicate())} on rank 0 and by "
                f"{own.get(name, Replicate())} on rank {rank}"
            )
    if len(worlds) > 1:
        faults.add(f"its files are of worlds of {' and of '.join(map(str, sorted(worlds)))} ranks")
    elif worlds and worlds != {len(checkpoints)}:
        faults.add(f"it is of a world of {worlds.pop()} ranks, and holds the files of {len(checkpoints)}")
    return first


def refuse_single_rank_file(shards: Sequence[OpenedFile], faults: Problems) -> None:
    """Add a fault for a file that is a rank's, though it is not named like one."""
    for shard in shards:
        world_size = parse_world_size(shard.header.metadata, path=shard.path)
        if world_size not in (None, 1):
            faults.add(
                f"{shard.path} holds a rank's part of a world of {world_size}: pass the directory with all of them, "
                "and the pattern of their names"
            )
