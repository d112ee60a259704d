"""Where bytes come from: `from_url` chooses the store."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from asyncshard.stores.base import Listing, ObjectMeta, Pacing, Store
from asyncshard.stores.local.store import LocalStore

__all__ = ["Listing", "LocalStore", "ObjectMeta", "Pacing", "Store", "file_from_url", "from_url", "name_of_file"]


def from_url(
    url: str | os.PathLike[str],
    *,
    max_workers: int | None = None,
    page_cache: str = "keep",
    **storage_options: Any,
) -> Store:
    """Return the store for a local path or a URL. It does no I/O.

    Parameters
    ----------
    url : str or path
        A path, ``file:///path``, or ``s3://bucket/prefix``.
    max_workers : int, optional
        Reads in flight at most; by default what suits the store.
    page_cache : {"keep", "drop"}
        Whether the kernel keeps local files in its page cache after they were read.
    **storage_options
        The store's constructor arguments.

    Raises
    ------
    ValueError
        A scheme that no store serves.
    TypeError
        An option that the store does not know.
    ImportError
        The packages that the store needs are not installed.
    """
    path = os.fspath(url)
    if not isinstance(path, str):
        raise TypeError(f"a model path is a str or a path of str, not {path!r}")
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a path")
    match = re.match("([A-Za-z][A-Za-z0-9+.-]*)://", path)
    scheme = match[1].lower() if match else ""
    if scheme not in _MAKERS:
        raise ValueError(f"{path}: no store serves {scheme}://; a local path, file:// or s3:// URL is needed")
    return _MAKERS[scheme](path, max_workers=max_workers, page_cache=page_cache, **storage_options)


def file_from_url(url: str | os.PathLike[str], **options: Any) -> tuple[Store, str]:
    """Return the store of the folder that a file is in, and the file's name there. It does no I/O.

    Parameters and errors are those of `from_url`.
    """
    path = os.fspath(url)
    name = name_of_file(url)
    if _is_local(path):
        options["allow_symlinks"] = True  # the user named the file, and nothing else is opened
    folder, slash, _ = path.rpartition("/")
    return from_url(folder + slash or ".", **options), name


def name_of_file(url: str | os.PathLike[str]) -> str:
    """Return the last part of a file's path or URL, as its store names it."""
    path = os.fspath(url)
    if not isinstance(path, str):
        raise TypeError(f"a file's path is a str or a path of str, not {path!r}")
    name = path.rpartition("/")[2]
    if not name:
        raise ValueError(f"{path!r} names no file")
    return unquote(name) if path[:7].lower() == "file://" else name


def _is_local(path: str) -> bool:
    return "://" not in path or path[:7].lower() == "file://"


def _local_store(path: str, **options: Any) -> Store:
    _require_known(LocalStore, options)
    return LocalStore(path, **options)


def _file_store(url: str, **options: Any) -> Store:
    host, path = urlsplit(url)[1:3]
    if host not in ("", "localhost"):
        raise ValueError(f"{url}: a file URL names no host; write file:///{host}{path}, or a path without file://")
    return _local_store(unquote(path), **options)


def _s3_store(url: str, *, page_cache: str, **options: Any) -> Store:
    from asyncshard.stores.s3 import S3Store

    return S3Store(url, **options)


_MAKERS: Mapping[str, Callable[..., Store]] = {"": _local_store, "file": _file_store, "s3": _s3_store}
"""Makers of stores, by the scheme of the URL. A store that needs optional packages is imported when it is made."""


def _require_known(store: Callable[..., Store], options: Mapping[str, Any]) -> None:
    """Raise TypeError for options that the constructor of a store does not have."""
    tuning = ("max_workers", "page_cache")
    named = [item.name for item in inspect.signature(store).parameters.values() if item.kind is item.KEYWORD_ONLY]
    known = [name for name in named if name not in tuning]
    unknown = sorted(set(options) - set(named))
    if unknown:
        raise TypeError(
            f"unknown storage option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
            f"this store knows {', '.join(known)}"
        )
