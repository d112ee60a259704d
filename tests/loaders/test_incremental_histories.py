"""Random histories of `IncrementalShardLoader` against a model: sizes account exactly after every step."""

import asyncio
import gc
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from asyncshard import IncrementalShardLoader
from asyncshard.errors import StoreError
from asyncshard.stores.opening import StoreAccess
from asyncshard.testing import Fault, FaultyStore

PAGE = 4096
FILES = 5
SIZES = (1, 3, 5, 8, 13)
"""Pages of each file's tensor."""
BUDGET_PAGES = 20
CACHE_SIZE = 3


@dataclass(eq=False)
class Copy:
    """The tensors of a file, as they were read once."""

    number: int
    charge: int
    header: int
    holders: int = 0
    is_handed_over: bool = False


@dataclass
class Model:
    """What is cached, least recently used first, and what is in use beside it, oldest first."""

    budget: int
    cached: list[Copy] = field(default_factory=list)
    in_use: list[Copy] = field(default_factory=list)

    def used(self):
        in_use = sum(copy.charge for copy in self.in_use if not copy.is_handed_over)
        return in_use + sum(copy.charge + copy.header for copy in self.cached)

    def held(self):
        return sum(copy.charge for copy in self.in_use)

    def evict(self, copy):
        self.cached.remove(copy)
        if copy.holders:
            self.in_use.append(copy)

    def make_room(self, nbytes):
        while self.used() + nbytes > self.budget:
            if self.cached:
                self.evict(self.cached[0])
            else:
                next(copy for copy in self.in_use if not copy.is_handed_over).is_handed_over = True

    def load(self, number, charge, header):
        for copy in self.cached:
            if copy.number == number:
                self.cached.remove(copy)
                self.cached.append(copy)
                return copy
        self.make_room(header)
        self.make_room(header + charge)
        while len(self.cached) >= CACHE_SIZE:
            self.evict(self.cached[0])
        self.cached.append(Copy(number, charge, header))
        return self.cached[-1]

    def drop(self, copy):
        copy.holders -= 1
        if not copy.holders and copy in self.in_use:
            self.in_use.remove(copy)


class Histories(RuleBasedStateMachine):
    """Load, hold, drop, cancel, fail, evict, and several at once."""

    held = Bundle("held")

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.paths = [str(self.folder / f"{number}.safetensors") for number in range(FILES)]
        self.loop = asyncio.new_event_loop()
        self.faults = {}
        self.items = []
        self.open_folder = StoreAccess.open_folder
        StoreAccess.open_folder = lambda access, file: self.open_faulty(access, file)
        for number, path in enumerate(self.paths):
            self.write(path, np.full(SIZES[number] * PAGE // 4, number, np.int32))
        self.loader = IncrementalShardLoader(memory_budget_mb=BUDGET_PAGES * PAGE / 2**20, cache_size=CACHE_SIZE)
        self.headers = [self.header_bytes(path) for path in self.paths]
        self.model = Model(BUDGET_PAGES * PAGE)

    @staticmethod
    def write(path, array):
        from safetensors.numpy import save_file

        save_file({"w": array}, path)

    def open_faulty(self, access, file):
        store, name = self.open_folder(access, file)
        return FaultyStore(store, self.faults), name

    def header_bytes(self, path):
        self.run(self.loader.load_shard(path))
        number = self.paths.index(path)
        header = self.loader.statistics().bytes_cached - SIZES[number] * PAGE
        self.loader.clear()
        return header

    def run(self, call):
        try:
            return self.loop.run_until_complete(call)
        finally:
            self.loop.run_until_complete(asyncio.sleep(0))  # what woke the caller is let go of

    def expect(self, number):
        return self.model.load(number, SIZES[number] * PAGE, self.headers[number])

    @rule(number=st.integers(0, FILES - 1))
    def load(self, number):
        shard = self.run(self.loader.load_shard(self.paths[number]))
        assert int(shard["w"][-1]) == number
        self.expect(number)

    @rule(target=held, number=st.integers(0, FILES - 1), is_tensor=st.booleans())
    def hold(self, number, is_tensor):
        shard = self.run(self.loader.load_shard(self.paths[number]))
        copy = self.expect(number)
        copy.holders += 1
        self.items.append([copy, shard["w"][1:] if is_tensor else shard])
        return self.items[-1]

    @rule(item=consumes(held))
    def drop(self, item):
        if not item:
            return
        copy, thing = item
        assert int((thing if isinstance(thing, np.ndarray) else thing["w"])[-1]) == copy.number
        item.clear()
        del thing
        self.model.drop(copy)

    @rule(number=st.integers(0, FILES - 1))
    def fail(self, number):
        is_cached = any(copy.number == number for copy in self.model.cached)
        self.faults[0] = Fault(error=StoreError("broken"))
        try:
            self.run(self.loader.load_shard(self.paths[number]))
        except StoreError:
            assert not is_cached
        else:
            assert is_cached
        self.faults.clear()
        gc.collect()  # the error's frames
        self.forget_order()

    @rule(number=st.integers(0, FILES - 1), turns=st.integers(0, 30))
    def cancel(self, number, turns):
        async def run():
            task = asyncio.ensure_future(self.loader.load_shard(self.paths[number]))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        self.run(run())
        self.forget_order()

    @rule(numbers=st.lists(st.integers(0, FILES - 1), min_size=2, max_size=6), victim=st.integers(0, 5))
    def load_together(self, numbers, victim):
        async def run():
            tasks = [asyncio.ensure_future(self.loader.load_shard(self.paths[number])) for number in numbers]
            await asyncio.sleep(0)
            if victim < len(tasks):
                tasks[victim].cancel()
            async with asyncio.timeout(20):
                await asyncio.wait(tasks)
            for index, (task, number) in enumerate(zip(tasks, numbers, strict=True)):
                if index != victim:
                    assert int(task.result()["w"][-1]) == number

        self.run(run())
        self.forget_order()

    def forget_order(self):
        """After what cannot be foretold, begin anew with an empty cache and nothing in use."""
        statistics = self.loader.statistics()
        assert statistics.reads_in_flight == 0
        self.loader.clear()
        self.run(asyncio.sleep(0))
        for copy in self.model.cached.copy():
            self.model.evict(copy)
        # In which order they did, and so what left the budget, is not foretold: nobody holds anything from here on.
        for item in self.items:
            item.clear()
        self.items.clear()
        self.model.in_use.clear()
        self.run(asyncio.sleep(0))

    @rule(number=st.integers(0, FILES - 1))
    def evict(self, number):
        copy = next((copy for copy in self.model.cached if copy.number == number), None)
        assert self.loader.evict(self.paths[number]) == (copy is not None)
        if copy is not None:
            self.model.evict(copy)

    @rule()
    def clear(self):
        self.loader.clear()
        for copy in self.model.cached.copy():
            self.model.evict(copy)

    @invariant()
    def sizes_account_exactly(self):
        if not hasattr(self, "model"):
            return
        statistics = self.loader.statistics()
        assert statistics.reads_in_flight == 0
        assert statistics.shards_cached == len(self.model.cached)
        assert statistics.bytes_cached == sum(copy.charge + copy.header for copy in self.model.cached)
        assert statistics.bytes_held == self.model.held()
        assert self.loader.budget.bytes_used == self.model.used() <= self.model.budget

    def teardown(self):
        if hasattr(self, "model"):
            self.run(self.loader.aclose())
            assert self.loader.budget.bytes_used == 0
            StoreAccess.open_folder = self.open_folder
            self.loop.close()
            shutil.rmtree(self.folder)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
