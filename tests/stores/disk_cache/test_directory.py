"""The directory of a cache, whoever it belongs to and whatever stands in it."""

import errno
import os

import pytest


@pytest.mark.skipif(os.geteuid() != 0, reason="takes on another user")
@pytest.mark.parametrize("is_filled", [False, True])
async def test_a_directory_of_another_user_that_is_read_only(is_filled, load, tmp_path, data, warnings_of):
    (tmp_path / "cache").mkdir(0o755)
    if is_filled:
        await load()
        for path in (tmp_path / "cache").rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
    opened = [path for path in tmp_path.parents if not path.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in (tmp_path, *opened)}
    for path, mode in modes.items():
        path.chmod(mode | 0o011)
    os.seteuid(65534)
    try:
        result, store = await load()
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)
    assert result == data
    assert store.nbytes == (0 if is_filled else len(data))
    assert len(warnings_of()) == (0 if is_filled else 1)


async def test_a_directory_where_others_may_write_is_not_used(load, tmp_path, data, warnings_of):
    await load()
    (tmp_path / "cache" / "entries").chmod(0o777)
    result, store = await load()
    assert result == data
    assert store.nbytes == len(data)
    assert "others may write" in warnings_of()[0]


async def test_a_file_where_the_directory_should_be(load, tmp_path, data, warnings_of):
    (tmp_path / "cache").write_bytes(b"")
    assert (await load())[0] == data
    assert len(warnings_of()) == 1


async def test_a_wrong_entry_that_cannot_be_removed_is_read_no_more(make_cache, load, entries, data, monkeypatch):
    await load()
    entries()[0].write_bytes(b"not an entry")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    cache = make_cache()
    for _ in range(2):
        result, store = await load(cache)
        assert result == data
        assert store.nbytes >= len(data)
