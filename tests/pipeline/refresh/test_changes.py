"""Changed tensors are laid out one after the other, and copied to their destinations in jobs."""

import numpy as np
import pytest

from asyncshard import MemoryBudget
from asyncshard.arrays.frameworks import load_library
from asyncshard.errors import DestinationError
from asyncshard.format.header import HeaderLimits
from asyncshard.pipeline.checkpoint.checkpoint import Checkpoint
from asyncshard.pipeline.checkpoint.opened_file import FileReader, read_header_of
from asyncshard.pipeline.refresh.changes import ChangedTensors, CopyJob
from asyncshard.pipeline.transfer.destinations import StridedTarget
from asyncshard.pipeline.transfer.matching import match_destinations
from asyncshard.tasks.threads import DaemonThreads
from asyncshard.testing import MemoryStore

MIB = 1 << 20


class Sink:
    async def write(self, offset, buffer):
        raise AssertionError("nobody writes in these tests")


@pytest.fixture
async def changes_of(checkpoints):
    """Return changed tensors that are staged in memory of a budget, with their values."""
    accounts = []

    async def make(tensors, into):
        store = MemoryStore({"x.safetensors": checkpoints.shard(tensors)})
        threads = DaemonThreads(1, "asyncshard-test")
        shard = await read_header_of(store, "x.safetensors", threads, HeaderLimits(), None)
        await threads.aclose()
        checkpoint, library = Checkpoint((shard,), FileReader(store)), load_library("np")
        matched = match_destinations(checkpoint, into, library, strict=False, cast=False, path="x")
        changes = ChangedTensors(checkpoint, matched.shards, library, 4096, cast=False)
        layout = changes.lay_out(64)
        accounts.append(MemoryBudget(64).open_account())
        changes.lease, changes.offsets = await accounts[-1].allocate(layout.nbytes), layout.offsets
        for tensor in changes.tensors():
            changes.bytes_of(tensor, 0, tensor.nbytes)[:] = tensors[tensor.name].tobytes()
        return changes, layout

    yield make
    for account in accounts:
        account.close()


async def test_tensors_are_laid_out_at_multiples_of_the_spacing_without_those_that_are_unwanted(changes_of):
    tensors = {"a": np.arange(100, dtype="u1"), "unwanted": np.zeros(500, "u1"), "b": np.arange(3.0)}
    changes, layout = await changes_of(tensors, {"a": np.zeros(100, "u1"), "b": np.zeros(3)})
    assert changes.names() == ("a", "b")
    assert [tensor.offset for tensor in changes.tensors()] == [0, 128]
    assert layout.nbytes == 128 + 64


async def test_a_staged_tensor_is_seen_as_a_view(changes_of):
    changes, _ = await changes_of({"w": np.arange(6.0).reshape(2, 3)}, {"w": np.zeros((2, 3))})
    (tensor,) = changes.tensors()
    view = changes.view(tensor)
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    changes.bytes_of(tensor, 8, 16)[:] = np.array(9.0).tobytes()
    assert view[0, 1] == 9


async def test_large_arrays_are_divided_among_jobs_and_others_go_to_the_first(changes_of):
    tensors = {
        "large": np.arange(MIB, dtype="<i4"),
        "small": np.arange(7.0),
        "strided": np.arange(MIB, dtype="<i4"),
        "sink": np.ones(3),
    }
    into = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
    into["strided"], into["sink"] = np.zeros(2 * MIB, "<i4")[::2], Sink()
    changes, _ = await changes_of(tensors, into)
    jobs = [CopyJob(), CopyJob()]
    assert [tensor.name for tensor in changes.add_copies(jobs)] == ["sink"]
    assert [job.nbytes for job in jobs] == [2 * MIB + 56 + 4 * MIB, 2 * MIB]
    for job in jobs:
        job.run()
        assert job.nbytes == 0
    assert all(np.array_equal(into[name], tensors[name]) for name in ("large", "small", "strided"))


async def test_memory_that_has_moved_is_looked_up_again_and_must_still_fit(changes_of):
    moving = np.zeros(4, "<f4")
    changes, _ = await changes_of({"w": np.ones(4, "<f4")}, {"w": moving})
    moving.shape = (2, 2)
    with pytest.raises(DestinationError, match="shape"):
        changes.add_copies([CopyJob()])


def test_a_job_copies_bytes_and_elements_and_forgets_them():
    flat, strided = np.zeros(4, "u1"), StridedTarget(np.zeros(4, "<f8")[::2], np.dtype("<f4"))
    job = CopyJob()
    job.add(flat, np.arange(4, dtype="u1"))
    job.add(strided, np.array([5, 6], "<f4").view("u1"))
    assert job.nbytes == 12
    job.run()
    assert (flat.tolist(), strided.target.tolist(), job.nbytes) == ([0, 1, 2, 3], [5, 6], 0)
    strided.target[:] = 0
    job.run()
    assert not strided.target.any()
