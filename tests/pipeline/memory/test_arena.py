import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncshard.pipeline.memory.arena import PAGE, Arena, round_up


class ArenaMachine(RuleBasedStateMachine):
    """Against a model that remembers every page: who has it, and whether it may be resident."""

    @initialize(pages=st.integers(1, 64))
    def make(self, pages):
        self.budget = pages * PAGE
        self.arena = Arena(self.budget)
        self.taken = []
        self.idle = []
        self.touched = {}
        """For each region, the pages that may be resident."""

    def pages(self, extent):
        return set(range(extent.start // PAGE, extent.stop // PAGE))

    def has_regions(self):
        return {id(extent.region): extent.region for extent in self.taken + self.idle}

    @rule(nbytes=st.one_of(st.integers(0, 8 * PAGE), st.integers(0, 200 * PAGE), st.just(2 << 20)))
    def allocate(self, nbytes):
        extent = self.arena.allocate(nbytes)
        size = extent.stop - extent.start
        assert size == max(round_up(nbytes), PAGE)
        assert extent.start % PAGE == 0
        assert 0 <= extent.start < extent.stop <= extent.region.nbytes
        for other in self.taken + self.idle:
            if other.region is extent.region:
                assert other.stop <= extent.start or extent.stop <= other.start
        self.taken.append(extent)
        self.touched.setdefault(extent.region, set()).update(self.pages(extent))

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data):
        extent = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.arena.free(extent)
        self.forget_spare(extent)

    @precondition(lambda self: not self.idle)
    @rule(limit=st.integers(0, 300 * PAGE))
    def take_idle(self, limit):
        before = self.arena.resident
        self.idle = self.arena.take_idle(limit)
        size = sum(extent.stop - extent.start for extent in self.idle)
        assert self.arena.resident == before  # until the pages have been discarded
        remaining = before - size
        used = sum(extent.stop - extent.start for extent in self.taken)
        assert remaining <= max(limit, used)
        if self.idle:
            # No more than needed, but for what the last one was too large.
            assert remaining + (self.idle[-1].stop - self.idle[-1].start) > limit

    @precondition(lambda self: self.idle)
    @rule()
    def give_back(self):
        for extent in self.idle:
            self.touched[extent.region] -= self.pages(extent)
            self.arena.free(extent, is_touched=False)
        extents, self.idle = self.idle, []
        for extent in extents:
            self.forget_spare(extent)

    def forget_spare(self, extent):
        """The arena may let a region go that nobody uses: it is unmapped then."""
        region = extent.region
        if region not in self.arena._gaps:
            assert not any(other.region is region for other in self.taken + self.idle)
            self.touched.pop(region, None)

    @invariant()
    def resident_is_what_may_be_resident(self):
        if hasattr(self, "arena"):
            assert self.arena.resident == PAGE * sum(map(len, self.touched.values()))


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_extents_that_were_freed_can_be_taken_again_as_one():
    arena = Arena(64 * PAGE)
    extents = [arena.allocate(PAGE) for _ in range(512)]
    for extent in extents[::2] + extents[1::2]:
        arena.free(extent)
    assert arena.resident == 512 * PAGE
    whole = arena.allocate(512 * PAGE)
    assert (whole.region, whole.start) == (extents[0].region, 0)
    assert arena.resident == 512 * PAGE


def test_the_lowest_address_that_fits_is_taken():
    arena = Arena(64 * PAGE)
    first, second, _third = (arena.allocate(2 * PAGE) for _ in range(3))
    arena.free(first)
    arena.free(second)
    assert arena.allocate(PAGE).start == 0
    assert arena.allocate(3 * PAGE).start == PAGE


def test_regions_beyond_the_first_go_when_they_are_free():
    arena = Arena(PAGE)
    extents = [arena.allocate(2 << 20) for _ in range(4)]
    assert len({extent.region for extent in extents}) == 4
    for extent in extents:
        arena.free(extent)
    assert arena.resident <= 2 << 20


def test_an_extent_larger_than_a_region_gets_a_region_of_its_own():
    arena = Arena(PAGE)
    extent = arena.allocate(100 << 20)
    assert extent.stop - extent.start == 100 << 20
    arena.free(extent)


@pytest.mark.parametrize(("nbytes", "rounded"), [(0, 0), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_sizes_are_rounded_up_to_pages(nbytes, rounded):
    assert round_up(nbytes) == rounded
