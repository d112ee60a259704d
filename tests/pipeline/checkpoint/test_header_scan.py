"""Headers of many files are read within a limit of memory, and a faulty file is a result beside the others."""

import errno

import numpy as np
import pytest

from asyncshard.errors import (
    AccessDeniedError,
    BudgetError,
    FormatError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
)
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.header_scan import HeaderScan, is_about_the_file
from asyncshard.stores.wrapper import WrapperStore
from asyncshard.testing import MemoryStore


@pytest.fixture
def files(checkpoints):
    return {f"{number}.safetensors": checkpoints.shard({f"t{number}": np.zeros(number, "u1")}) for number in range(20)}


def scan(store, threads, *, memory_bytes=1 << 20, keep=lambda name, header: (name, list(header))):
    return HeaderScan(store, threads, keep, limits=HeaderLimits(), memory_bytes=memory_bytes)


async def test_what_is_kept_of_each_file_comes_in_the_order_of_the_names(files, threads):
    kept = await scan(MemoryStore(files), threads).run(list(files))
    assert kept == [(f"{number}.safetensors", [f"t{number}"]) for number in range(20)]


async def test_no_names_are_no_results(threads):
    assert await scan(MemoryStore({}), threads).run([]) == []


async def test_memory_for_one_header_at_a_time_is_enough_for_all(files, threads):
    largest = max(8 + int.from_bytes(data[:8], "little") for data in files.values())
    kept = await scan(MemoryStore(files), threads, memory_bytes=int(2.5 * largest)).run(list(files))
    assert [name for name, _ in kept] == list(files)


async def test_a_header_that_takes_more_than_the_limit_ends_the_scan(files, threads):
    with pytest.raises(BudgetError, match=r"0\.safetensors: its header needs .* raise memory_budget_mb") as caught:
        await scan(MemoryStore(files), threads, memory_bytes=10).run(["0.safetensors"])
    assert caught.value.needed_bytes > caught.value.budget_bytes == 10


async def test_a_file_that_is_wrong_or_gone_is_a_result_beside_the_others(files, threads):
    files["1.safetensors"] = b"no header at all"
    names = ["0.safetensors", "1.safetensors", "gone.safetensors", "2.safetensors"]
    first, wrong, gone, last = await scan(MemoryStore(files), threads).run(names)
    assert (first, last) == (("0.safetensors", ["t0"]), ("2.safetensors", ["t2"]))
    assert isinstance(wrong, FormatError)
    assert isinstance(gone, ObjectNotFoundError)


class DownStore(WrapperStore):
    """Answers nothing."""

    async def open(self, name, nbytes):
        error = StoreError("the storage does not answer")
        error.retryable = True
        raise error


async def test_a_storage_that_does_not_answer_ends_the_scan(files, threads):
    with pytest.raises(StoreError, match="does not answer"):
        await scan(DownStore(MemoryStore(files)), threads).run(list(files))


async def test_an_error_of_the_callers_own_ends_the_scan(files, threads):
    def keep(name, header):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await scan(MemoryStore(files), threads, keep=keep).run(list(files))


def with_facts(error, **facts):
    for name, value in facts.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("error", "is_about"),
    [
        (FormatError("bad"), True),
        (ObjectNotFoundError("gone"), True),
        (AccessDeniedError("closed"), True),
        (with_facts(ObjectChangedError("replaced"), retryable=True), True),
        (with_facts(StoreError("down"), retryable=True), False),
        (with_facts(StoreError("too many files"), errno=errno.EMFILE), False),
        (with_facts(StoreError("bad block"), errno=errno.EIO), True),
        (BudgetError("full", needed_bytes=2, budget_bytes=1), False),
        (ValueError("ours"), False),
    ],
    ids=str,
)
def test_an_error_is_the_files_if_other_files_would_not_fail_in_the_same_way(error, is_about):
    assert is_about_the_file(error) == is_about
