"""Folders that several reads share are opened once, and closed after the last of them."""

import asyncio
import os

import pytest

from asyncshard import MemoryBudget
from asyncshard.loaders.sources import Sources, key_of
from asyncshard.stores.opening import StoreAccess


@pytest.fixture
def sources():
    return Sources(StoreAccess(), "np", MemoryBudget(1))


def is_closed(store):
    return "closed" in repr(store)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    return tmp_path


async def test_files_of_one_folder_share_its_store(sources, folder):
    async with sources.opened(folder / "a.safetensors") as one, sources.opened(folder / "b.safetensors") as other:
        assert one.store is other.store
        assert (one.name, other.name) == ("a.safetensors", "b.safetensors")
        assert await other.store.read(other.name) == b"b"


async def test_a_folder_is_closed_by_the_last_who_reads_from_it(sources, folder):
    async with sources.opened(folder / "a.safetensors") as one:
        async with sources.opened(folder / "b.safetensors"):
            pass
        assert await one.store.read(one.name) == b"a"
    assert is_closed(one.store)
    async with sources.opened(folder / "a.safetensors") as again:
        assert again.store is not one.store


async def test_a_folder_that_is_kept_is_closed_with_the_sources(sources, folder):
    sources.are_kept = True
    async with sources.opened(folder / "a.safetensors") as one:
        pass
    async with sources.opened(folder / "b.safetensors") as other:
        assert one.store is other.store
        sources.are_kept = False
        await sources.aclose()
        assert await other.store.read(other.name) == b"b"
    assert is_closed(one.store)


async def test_an_error_closes_the_folder_too(sources, folder):
    with pytest.raises(ZeroDivisionError):
        async with sources.opened(folder / "a.safetensors") as one:
            raise ZeroDivisionError
    assert is_closed(one.store)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_a_key_is_a_url_or_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert key_of("a.safetensors") == key_of(tmp_path / "a.safetensors") == os.path.abspath("a.safetensors")
    assert key_of("s3://bucket/model/") == key_of("s3://bucket/model") == "s3://bucket/model"
