"""The files of a rank while somebody may be saving them anew: they must be those of one save."""

from __future__ import annotations

from collections.abc import Sequence

from asyncshard.errors import ObjectChangedError, ObjectNotFoundError
from asyncshard.format.save_id import save_id_of
from asyncshard.pipeline.checkpoint.opened_file import OpenedFile
from asyncshard.plan.files.saves import save_fault
from asyncshard.stores.base import Store


def require_one_save(files: Sequence[OpenedFile], path: str) -> None:
    """Raise ObjectChangedError where a rank's files come from two saves, or are not all of one."""
    fault = save_fault([(file.meta.name, save_id_of(file.header.metadata)) for file in files], path)
    if fault is not None:
        raise fault


async def error_of_replaced(store: Store, name: str) -> Exception | None:
    """Return the error for a file that was listed and could not be found: None for a link to nothing."""
    try:
        if name in (await store.list()).names:
            await store.open(name, 1)  # another one has its name by now
    except ObjectNotFoundError:
        return None
    except Exception as other:
        return other
    path = store.path_of(name)
    return ObjectChangedError(f"{path}: the file was replaced or removed during the load; load it again", path=path)
