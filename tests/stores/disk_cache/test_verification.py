"""Every block of a cache is compared, and what was found is reported. Also tests `report`.

That a user can ask for it is tested in tests/loaders/test_cache.py.
"""

import os

import pytest

from asyncshard._core import StopFlag
from asyncshard.stores.disk_cache.verification import verify


async def test_blocks_that_match_are_counted(make_cache, load, data):
    await load()
    report = verify(make_cache(), StopFlag())
    assert (report.entries, report.blocks, report.nbytes, report.dropped) == (1, 6, len(data), ())


async def test_an_entry_that_does_not_match_is_dropped_and_the_others_stay(make_cache, load, origin, entries, data):
    await load()
    (path,) = entries()
    await load(store=origin("b"), name="b")
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([data[-1] ^ 1]))
    report = verify(make_cache(), StopFlag())
    assert (report.entries, report.dropped) == (1, (str(path),))
    assert path not in entries()


def test_a_cache_that_was_never_used_has_nothing_wrong(make_cache, tmp_path):
    (tmp_path / "cache").mkdir()
    assert verify(make_cache(), StopFlag()).entries == 0


def test_a_cache_that_is_not_there_is_an_error(make_cache):
    with pytest.raises(FileNotFoundError):
        verify(make_cache(), StopFlag())


async def test_verification_ends_early_when_it_is_told_to(make_cache, load):
    await load()
    stop = StopFlag()
    stop.set()
    assert verify(make_cache(), stop).dropped == ()
