"""Every tuning option changes what a load does; what is no option, or no value of it, is an error."""

import asyncio
import errno
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import asyncshard
from asyncshard import AsyncShardLoader, MemoryBudget, ShardedStateLoader
from asyncshard.errors import AccessDeniedError, BudgetError, FormatError
from asyncshard.testing import GatedStore, MemoryStore

KIB, MIB = 1 << 10, 1 << 20
LOADERS = [ShardedStateLoader, AsyncShardLoader]


@pytest.fixture
def gated(checkpoints):
    """Make a store of `count` tensors of `nbytes` each, whose reads wait for the test."""

    def make(count=16, nbytes=256 * KIB):
        tensors = {f"t{i:02}": np.full(nbytes, i, np.uint8) for i in range(count)}
        return GatedStore(MemoryStore(checkpoints.rank_files(tensors)))

    return make


async def settled(store):
    """Return the reads that wait once no more come of themselves."""
    count = -1
    while count != len(store.gates):
        count = len(store.gates)
        for _ in range(50):
            await asyncio.sleep(0)
    return store.gates


async def reads_ahead(stream, store, at_least=1):
    """Ask for the first tensor, and return the reads that this sets off before anything arrives."""
    first = asyncio.create_task(anext(stream))
    await store.waiting(at_least)
    await settled(store)
    gates = list(store.gates)
    first.cancel()
    await asyncio.wait([first])
    return gates


# What each does


@pytest.mark.parametrize("budget_mb", [1, 2, 3])
async def test_memory_budget_mb_bounds_the_bytes_that_are_read_ahead(budget_mb, gated):
    store = gated()
    loader = AsyncShardLoader(memory_budget_mb=budget_mb, prefetch_count=100, chunk_size=256 * KIB)
    async with loader.stream(store) as stream:
        reads = await reads_ahead(stream, store, 2)
        assert sum(read.nbytes for read in reads) <= loader.budget.bytes_used <= budget_mb * MIB
        assert len(reads) == 4 * budget_mb - 1  # and a header
    assert loader.budget.bytes_used == 0


async def test_memory_budget_mb_refuses_a_tensor_above_it_at_await(gated):
    store = gated(2, 3 * MIB // 2)
    with pytest.raises(BudgetError, match=r"'t00'.*1,572,864.*1,048,576") as caught:
        await AsyncShardLoader(memory_budget_mb=1).stream(store)
    assert (caught.value.needed_bytes, caught.value.budget_bytes) == (3 * MIB // 2, MIB)
    assert caught.value.tensor == "t00"
    store.open_all()
    assert len([name async for name, _ in AsyncShardLoader(memory_budget_mb=2).stream(store)]) == 2


async def test_a_budget_of_just_the_largest_tensor_is_enough(gated):
    store = gated(6, MIB)
    store.open_all()
    kept = [tensor async for _, tensor in AsyncShardLoader(memory_budget_mb=1).stream(store)]
    assert [int(tensor[-1]) for tensor in kept] == list(range(6))


async def test_a_shared_budget_bounds_the_loaders_together(gated):
    budget = MemoryBudget(2)
    stores = [gated(), gated()]
    loaders = [AsyncShardLoader(budget=budget, prefetch_count=5, chunk_size=256 * KIB) for _ in stores]
    assert all(loader.budget is budget for loader in loaders)
    streams = [await loader.stream(store) for loader, store in zip(loaders, stores, strict=True)]
    firsts = [asyncio.create_task(anext(stream)) for stream in streams]
    for store in stores:
        await store.waiting(1)
    reads = [read for store in stores for read in [*await settled(store)]]
    assert sum(read.nbytes for read in reads) <= budget.bytes_used <= 2 * MIB
    assert len(reads) == 7  # and two headers
    for store in stores:
        store.open_all()
    await asyncio.gather(*firsts)
    del firsts
    for stream in streams:
        assert len([name async for name, _ in stream]) == 15
    assert budget.bytes_used == 0


async def test_two_streams_of_a_shared_budget_may_be_read_in_step(gated):
    budget = MemoryBudget(2)
    stores = [gated(), gated()]
    for store in stores:
        store.open_all()
    loader = AsyncShardLoader(budget=budget, prefetch_count=100, chunk_size=256 * KIB)
    async with asyncio.timeout(3), loader.stream(stores[0]) as one, loader.stream(stores[1]) as two:
        names = [(name, (await anext(two))[0]) async for name, _ in one]
    assert len(names) == 16
    assert all(name == other for name, other in names)


async def test_streams_of_a_shared_budget_may_be_read_in_another_order_than_they_were_opened(gated):
    budget = MemoryBudget(2)
    stores = [gated(3, 3 * MIB // 2) for _ in range(3)]
    for store in stores:
        store.open_all()
    loader = AsyncShardLoader(budget=budget)
    async with asyncio.timeout(20):
        streams = [await loader.stream(store) for store in stores]
        for stream in reversed(streams):
            assert [int(tensor[0]) async for _, tensor in stream] == [0, 1, 2]


async def test_two_loads_that_each_need_more_than_half_of_a_shared_budget_both_end(gated):
    budget = MemoryBudget(2)
    stores = [gated(4, 3 * MIB // 2), gated(4, 3 * MIB // 2)]
    for store in stores:
        store.open_all()

    async def run(store):
        return [int(tensor[0]) async for _, tensor in AsyncShardLoader(budget=budget).stream(store)]

    assert await asyncio.gather(*map(run, stores)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("count", [1, 3, 16])
async def test_prefetch_count_is_how_many_reads_run_ahead(count, gated):
    store = gated()
    loader = AsyncShardLoader(prefetch_count=count, chunk_size=256 * KIB)
    async with loader.stream(store) as stream:
        assert len(await reads_ahead(stream, store, count)) == count


@pytest.mark.parametrize("count", [1, 3])
async def test_max_workers_is_how_many_threads_read(count, tmp_path):
    options = ShardedStateLoader(max_workers=count).options
    store = options.access().open(tmp_path)
    barrier = threading.Barrier(count)

    def job():
        barrier.wait(30)
        return threading.current_thread().name

    names = await asyncio.gather(*(store._threads.run(job) for _ in range(3 * count)))
    assert len(set(names)) == count
    await store.aclose()


async def test_max_workers_reaches_the_reads_of_a_load(tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", checkpoints.tensors(64, nbytes=64 * KIB))
    seen = set()
    async for _ in asyncshard.stream(path, max_workers=1, chunk_size=64 * KIB):
        seen |= {thread.name for thread in threading.enumerate() if thread.name.startswith("asyncshard-read")}
    assert seen == {"asyncshard-read-0"}


@pytest.mark.parametrize("chunk_size", [64 * KIB, 100_000, 256 * KIB, MIB])
@pytest.mark.parametrize("is_in_place", [False, True])
async def test_chunk_size_bounds_each_read(chunk_size, is_in_place, gated):
    store = gated()
    into = {f"t{i:02}": np.zeros(256 * KIB, np.uint8) for i in range(16)} if is_in_place else None
    loader = AsyncShardLoader(chunk_size=chunk_size, prefetch_count=100)
    async with loader.stream(store, into) as stream:
        reads = await reads_ahead(stream, store, 4)
        assert max(read.nbytes for read in reads) <= chunk_size
        assert sum(read.nbytes for read in reads) == 4 * MIB
        if chunk_size == MIB:
            assert len(reads) == 4


async def test_framework_chooses_the_library_of_the_tensors(gated):
    torch = pytest.importorskip("torch")
    store = gated(2)
    store.open_all()
    kinds = {"np": np.ndarray, "pt": torch.Tensor}
    for framework, kind in kinds.items():
        loader = AsyncShardLoader(framework=framework)
        assert all([isinstance(tensor, kind) async for _, tensor in loader.stream(store)])
        assert all(isinstance(tensor, kind) for tensor in (await loader.load_weights_async(store)).values())


def is_cached(path):
    """Return whether the page cache holds the middle of a file."""
    with open(path, "rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(4096)], os.path.getsize(path) // 2, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            pytest.skip(f"the file system does not tell: {error}")
    return True


@pytest.mark.parametrize("is_in_place", [False, True])
async def test_page_cache_says_whether_a_file_stays_in_memory(is_in_place, tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", {"w": np.ones(MIB, np.float32)})
    with path.open("rb") as file:
        os.fsync(file.fileno())  # a dirty page cannot be dropped
    into = {"w": np.zeros(MIB, np.float32)} if is_in_place else None
    await AsyncShardLoader(page_cache="keep").stream(path, into).drain()
    assert is_cached(path)
    await AsyncShardLoader(page_cache="drop").stream(path, into).drain()
    assert not is_cached(path)


async def test_strict_budget_is_an_error_where_others_are_handed_over(gated):
    store = gated(8, MIB // 2)
    store.open_all()
    kept = []

    async def keep_all(loader):
        async for _, tensor in loader.stream(store):
            kept.append(tensor)

    with pytest.raises(BudgetError, match="strict_budget=False"):
        await keep_all(AsyncShardLoader(memory_budget_mb=2, strict_budget=True))
    assert 1 <= len(kept) <= 5
    loader = AsyncShardLoader(memory_budget_mb=2)
    async with loader.stream(store) as stream:
        kept = [tensor async for _, tensor in stream]
        assert stream.statistics().bytes_held >= 2 * MIB
    assert [int(tensor[0]) for tensor in kept] == list(range(8))


async def test_strict_budget_spares_a_consumer_that_lets_go(gated):
    store = gated(8, MIB // 2)
    store.open_all()
    loader = AsyncShardLoader(memory_budget_mb=2, strict_budget=True)
    assert len([int(tensor[0]) async for _, tensor in loader.stream(store)]) == 8


async def test_order_is_that_of_the_plan(gated):
    store = gated(4)
    async with AsyncShardLoader(order="plan", chunk_size=256 * KIB).stream(store) as stream:
        asking = asyncio.create_task(anext(stream))
        gates = sorted(await store.waiting(4), key=lambda gate: gate.start)
        for gate in reversed(gates):
            assert not asking.done()
            gate.open()
            await settled(store)
        assert [(await asking)[0], *[name async for name, _ in stream]] == ["t00", "t01", "t02", "t03"]


async def test_order_is_that_of_completion(gated):
    store = gated(4)
    async with AsyncShardLoader(order="completion", chunk_size=256 * KIB).stream(store) as stream:
        asking = asyncio.create_task(anext(stream))
        gates = sorted(await store.waiting(4), key=lambda gate: gate.start)
        names = []
        for index in (2, 3, 0, 1):
            gates[index].open()
            names.append((await asking)[0])
            asking = asyncio.create_task(anext(stream))
        with pytest.raises(StopAsyncIteration):
            await asking
        assert names == ["t02", "t03", "t00", "t01"]


@pytest.mark.parametrize("loader", LOADERS)
async def test_max_header_bytes_refuses_a_larger_header(loader, tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", {"w": np.zeros(3)}, padding=1000)
    size = (await asyncshard.read_header(path)).size - 8
    for limit in (1, size - 1):
        made = loader(max_header_bytes=limit)
        with pytest.raises(FormatError, match=f"max_header_bytes={limit}"):
            await open_stream(made, path)
    await (await open_stream(loader(max_header_bytes=size), path)).aclose()


@pytest.mark.parametrize("loader", LOADERS)
async def test_max_tensors_refuses_more_in_a_file(loader, tmp_path, checkpoints):
    path = checkpoints.write_file(tmp_path / "x", checkpoints.tensors(5))
    with pytest.raises(FormatError, match="4"):
        await open_stream(loader(max_tensors=4), path)
    await (await open_stream(loader(max_tensors=5), path)).aclose()


def open_stream(loader, path):
    return loader.stream(path) if isinstance(loader, AsyncShardLoader) else loader.iterate_weights(path)


async def test_storage_options_reach_the_store(tmp_path, checkpoints):
    checkpoints.write_file(tmp_path / "real", {"w": np.zeros(3)})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "model.safetensors").symlink_to("../real")
    with pytest.raises(AccessDeniedError):
        await AsyncShardLoader(storage_options={"allow_symlinks": False}).load_weights_async(tmp_path / "d")
    assert await AsyncShardLoader(storage_options={"allow_symlinks": True}).load_weights_async(tmp_path / "d")


@pytest.mark.parametrize("name", ["endpoint_url", "max_workers", "page_cache", "path", "url"])
async def test_a_storage_option_that_the_store_does_not_know_is_an_error(name, tmp_path, checkpoints):
    checkpoints.write_ranks(tmp_path, {"w": np.zeros(3)})
    with pytest.raises(TypeError, match=name):
        await asyncshard.load(tmp_path, storage_options={name: "x"})


# What is refused


BAD = [
    ({"memory_budget_mb": 0}, ValueError),
    ({"memory_budget_mb": -1}, ValueError),
    ({"memory_budget_mb": float("nan")}, ValueError),
    ({"memory_budget_mb": float("inf")}, ValueError),
    ({"memory_budget_mb": "4GB"}, TypeError),
    ({"memory_budget_mb": True}, TypeError),
    ({"budget": 4096}, TypeError),
    ({"budget": MemoryBudget(1), "memory_budget_mb": 1}, ValueError),
    ({"prefetch_count": 0}, ValueError),
    ({"prefetch_count": 1.5}, TypeError),
    ({"prefetch_count": True}, TypeError),
    ({"max_workers": 0}, ValueError),
    ({"max_workers": "2"}, TypeError),
    ({"chunk_size": 0}, ValueError),
    ({"chunk_size": 63}, ValueError),
    ({"chunk_size": 1e6}, TypeError),
    ({"framework": "tf"}, ValueError),
    ({"framework": "NP"}, ValueError),
    ({"framework": ["np"]}, ValueError),
    ({"page_cache": "flush"}, ValueError),
    ({"page_cache": True}, ValueError),
    ({"strict_budget": "no"}, TypeError),
    ({"strict_budget": 1}, TypeError),
    ({"order": "random"}, ValueError),
    ({"max_header_bytes": 0}, ValueError),
    ({"max_tensors": 0}, ValueError),
    ({"max_tensors": "many"}, TypeError),
    ({"cache_dir": 3}, TypeError),
    ({"cache_dir": ""}, TypeError),
    ({"cache_max_gb": 1}, ValueError),
    ({"cache_dir": "x", "cache_max_gb": 0}, ValueError),
    ({"cache_dir": "x", "cache_max_gb": float("inf")}, ValueError),
    ({"cache_dir": "x", "cache_max_gb": "1GB"}, TypeError),
    ({"storage_options": "allow_symlinks"}, TypeError),
    ({"storage_options": [("allow_symlinks", True)]}, TypeError),
    ({"memory_budget": 4}, TypeError),
    ({"prefetch": 4}, TypeError),
    ({"device": "cuda"}, TypeError),
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("given", "kind"), BAD, ids=lambda value: str(value))
def test_a_bad_option_is_an_error_when_the_loader_is_made(given, kind, loader):
    with pytest.raises(kind, match=next(reversed(given))):
        loader(**given)


def test_an_unknown_option_tells_which_there_are():
    with pytest.raises(TypeError, match=r"unknown option prefetch;.*prefetch_count"):
        ShardedStateLoader(prefetch=3)


@pytest.mark.parametrize("base", ["x", 3, asyncshard, ShardedStateLoader])
def test_a_base_loader_is_a_loader(base):
    with pytest.raises(TypeError, match="base_loader"):
        AsyncShardLoader(base)


# Inheritance


GIVEN = {
    "prefetch_count": 3,
    "max_workers": 5,
    "chunk_size": 4096,
    "framework": "pt",
    "page_cache": "drop",
    "strict_budget": True,
    "order": "completion",
    "max_header_bytes": 1000,
    "max_tensors": 10,
    "cache_dir": "cache",
    "cache_max_gb": 3,
    "storage_options": {"allow_symlinks": True},
    "memory_budget_mb": 7,
}
OTHER = {
    "prefetch_count": 4,
    "max_workers": 6,
    "chunk_size": 8192,
    "framework": "np",
    "page_cache": "keep",
    "strict_budget": False,
    "order": "plan",
    "max_header_bytes": 2000,
    "max_tensors": 20,
    "cache_dir": "other",
    "cache_max_gb": 4.5,
    "storage_options": {},
    "memory_budget_mb": 9,
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_loader_inherits_only_the_options_that_are_not_passed_to_it(name):
    base = ShardedStateLoader(rank=1, world_size=2, **GIVEN)
    assert AsyncShardLoader(base).options == base.options
    other = AsyncShardLoader(AsyncShardLoader(base), **{name: OTHER[name]})
    for each, value in GIVEN.items():
        assert getattr(other.options, each) == (OTHER[each] if each == name else value)
    assert other.selection.rank == 1
    assert getattr(base.options, name) == GIVEN[name]
    if name in ("max_header_bytes", "max_tensors"):
        assert getattr(other.selection.limits, name) == OTHER[name]
    if name == "memory_budget_mb":
        assert other.budget is not base.budget
        assert other.budget.nbytes == 9 * MIB
    else:
        assert other.budget is base.budget


def test_a_budget_given_to_the_outer_loader_takes_the_place_of_the_inner_ones_size_and_the_other_way_round():
    budget = MemoryBudget(3)
    outer = AsyncShardLoader(ShardedStateLoader(memory_budget_mb=5), budget=budget)
    assert outer.budget is budget
    assert outer.options.memory_budget_mb is None
    other = AsyncShardLoader(ShardedStateLoader(budget=budget), memory_budget_mb=5)
    assert other.budget is not budget
    assert other.budget.nbytes == 5 * MIB
    assert AsyncShardLoader(outer).budget is budget


def test_an_option_of_none_means_its_default():
    base = ShardedStateLoader(**GIVEN)
    assert AsyncShardLoader(base, **dict.fromkeys(GIVEN)).options == base.options
    assert AsyncShardLoader(base, None, None, budget=None).budget is base.budget


def test_the_default_budget_is_at_most_2048_mb_and_a_quarter_of_the_free_memory():
    nbytes = ShardedStateLoader().budget.nbytes
    with open("/proc/meminfo") as file:
        total = int(next(file).split()[1]) * KIB
    assert MIB <= nbytes <= min(2048 * MIB, total // 4)


# A loader is a value


def values(weights):
    return {name: int(array.reshape(-1)[0]) for name, array in weights.items()}


@pytest.fixture
def model(tmp_path, checkpoints):
    tensors = {f"t{i}": np.full(20_000, i, np.int32) for i in range(20)}
    return checkpoints.write_ranks(tmp_path / "model", tensors), {f"t{i}": i for i in range(20)}


def test_a_loader_belongs_to_no_event_loop(model):
    path, expected = model
    loader = AsyncShardLoader(memory_budget_mb=1)
    for _ in range(3):
        assert values(asyncio.run(loader.load_weights_async(path))) == expected
        assert asyncio.run(names_of(loader, path)) == list(expected)


async def names_of(loader, path):
    return [name async for name, _ in loader.stream(path)]


def test_a_loader_works_in_several_threads_at_once(model):
    path, expected = model
    loader = AsyncShardLoader(memory_budget_mb=1, chunk_size=64 * KIB)
    results = []
    barrier = threading.Barrier(4)

    def work():
        barrier.wait(30)
        for _ in range(3):
            results.append((values(asyncio.run(loader.load_weights_async(path))), asyncio.run(names_of(loader, path))))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [(expected, list(expected))] * 12
    assert loader.budget.bytes_used == 0


async def test_a_loader_runs_several_loads_at_once(model):
    path, expected = model
    base = ShardedStateLoader(memory_budget_mb=1)
    loader = AsyncShardLoader(base, chunk_size=64 * KIB)
    loads = [loader.load_weights_async(path) for _ in range(4)] + [base.load_weights(path) for _ in range(4)]
    assert [values(weights) for weights in await asyncio.gather(*loads)] == [expected] * 8
    assert await asyncio.gather(*(names_of(loader, path) for _ in range(10))) == [list(expected)] * 10
    assert base.budget.bytes_used == 0


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
async def test_a_loader_pickles_with_its_options_even_after_a_load(protocol, model):
    path, expected = model
    made = [
        ShardedStateLoader("model-rank-{rank}-part-{part}.safetensors", memory_budget_mb=3, prefetch_count=2),
        AsyncShardLoader(ShardedStateLoader(rank=0, world_size=2, chunk_size=4096), memory_budget_mb=3),
        AsyncShardLoader(budget=MemoryBudget(3)),
    ]
    for loader in made:
        await open_stream(loader, path).drain()
        copy = pickle.loads(pickle.dumps(loader, protocol))
        assert type(copy) is type(loader)
        assert copy.selection == loader.selection
        assert copy.budget.nbytes == 3 * MIB
        assert copy.budget is not loader.budget
        assert copy.options.chunk_size == loader.options.chunk_size
        assert [name async for name, _ in open_stream(copy, path)] == list(expected)


SPAWN = """
import asyncio, multiprocessing, sys
import asyncshard

def run(loader, path):
    return {name: int(array[0]) for name, array in asyncio.run(loader.load_weights_async(path)).items()}

if __name__ == "__main__":
    loader = asyncshard.AsyncShardLoader(asyncshard.ShardedStateLoader(), memory_budget_mb=2)
    here = run(loader, sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(run, (loader, sys.argv[1])) == here
        pool.close()
        pool.join()
    print(len(here))
"""


def test_a_loader_goes_to_a_spawned_process(model, tmp_path):
    path, expected = model
    (tmp_path / "job.py").write_text(SPAWN)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(tmp_path / "job.py"), str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(asyncshard.__file__).parents[1])},
    )
    assert (done.stdout, done.stderr) == (f"{len(expected)}\n", "")


def test_the_repr_of_a_loader_shows_its_selection():
    assert "rank=3" in repr(ShardedStateLoader(rank=3, world_size=4))


def test_options_do_not_change_after_the_loader_is_made():
    given = {"allow_symlinks": False}
    loader = ShardedStateLoader(storage_options=given)
    given["allow_symlinks"] = True
    given["nonsense"] = 1
    assert dict(loader.options.storage_options) == {"allow_symlinks": False}
    with pytest.raises(AttributeError):
        loader.options.chunk_size = 3


async def test_every_combination_of_small_numbers_gives_the_same_weights(model):
    path, expected = model
    for prefetch, workers, chunk, budget in itertools.product([1, 7], [1, 4], [64 * KIB, MIB], [0.25, 4]):
        options = {"prefetch_count": prefetch, "max_workers": workers, "chunk_size": chunk, "memory_budget_mb": budget}
        got = {name: int(array[-1]) async for name, array in asyncshard.stream(path, **options)}
        assert list(got.items()) == list(expected.items()), options
