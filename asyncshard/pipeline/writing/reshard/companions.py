"""The small files beside a checkpoint's weights: configuration and tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard._core import StopFlag
from asyncshard.errors import NotRegularFileError
from asyncshard.pipeline.writing.reshard.block_reader import Bytes
from asyncshard.pipeline.writing.reshard.target import Target
from asyncshard.stores.base import Store
from asyncshard.tasks.threads import DaemonThreads

_SUFFIXES = (".json", ".txt", ".model", ".jinja")
_FIRST_READ = 64 << 10


def companion_files(names: Sequence[str]) -> list[str]:
    """Return the files that go with the weights: those that configure a model or a tokenizer, and no index."""
    return [
        name
        for name in names
        if name.endswith(_SUFFIXES) and not name.endswith(".index.json") and not name.startswith(".")
    ]


async def copy_companions(
    store: Store, names: Sequence[str], target: Target, memory: Bytes, threads: DaemonThreads
) -> list[str]:
    """Copy files through `memory`; return those that are files."""
    copied = []
    stop = StopFlag()
    for name in names:
        try:
            meta, head = await store.open(name, min(_FIRST_READ, len(memory)))
        except NotRegularFileError:
            continue
        await threads.run(target.write, name, 0, [memoryview(head)], stop, on_cancel=stop.set)
        for start in range(len(head), meta.size, len(memory)):
            part = memory[: meta.size - start].data
            await store.read_into(meta, start, [part])
            await threads.run(target.write, name, start, [part], stop, on_cancel=stop.set)
        copied.append(name)
    return copied
