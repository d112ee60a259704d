"""Stores as loaders open them: from a path, with its options, and through a disk cache where one is asked for."""

import os

import pytest

from asyncshard.stores import LocalStore
from asyncshard.stores.disk_cache.store import CachedStore
from asyncshard.stores.opening import DEFAULT_CACHE_MAX_GB, StoreAccess, make_cache
from asyncshard.testing import MemoryStore


async def test_a_path_gives_a_store_with_the_options(tmp_path):
    async with StoreAccess(max_workers=3).open(tmp_path) as store:
        assert isinstance(store, LocalStore)
        assert store.url == str(tmp_path)


async def test_a_store_of_the_users_own_is_used_as_it_is():
    store = MemoryStore({})
    assert StoreAccess().open(store) is store


async def test_options_that_a_store_does_not_have_are_an_error(tmp_path):
    with pytest.raises(TypeError, match="nonsense"):
        StoreAccess(storage_options={"nonsense": 1}).open(tmp_path)


async def test_a_file_is_opened_by_its_folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"abc")
    store, name = StoreAccess().open_folder(tmp_path / "a.bin")
    async with store:
        assert (name, await store.read(name)) == ("a.bin", b"abc")
        assert (await store.list()).is_file is False


async def test_with_a_cache_stores_are_read_through_it(tmp_path):
    access = StoreAccess(cache=make_cache(tmp_path / "cache"), write_buffer_bytes=1 << 20)
    own = MemoryStore({})
    for store in (access.open(own), access.open_folder(tmp_path / "x.safetensors")[0]):
        assert isinstance(store, CachedStore)
        await store.aclose()


def test_a_cache_touches_nothing_before_it_is_used(tmp_path):
    cache = make_cache(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert cache.max_bytes == int(DEFAULT_CACHE_MAX_GB * (1 << 30))
    assert make_cache(tmp_path, 0.5).max_bytes == 1 << 29


def test_a_cache_directory_of_bytes_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="path of str"):
        make_cache(os.fsencode(tmp_path))


def test_secrets_among_the_options_are_not_shown():
    assert "hush" not in repr(StoreAccess(storage_options={"aws_secret_access_key": "hush"}))
