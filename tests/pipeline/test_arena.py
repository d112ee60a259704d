"""The arena: extents of several regions come and go in any order."""

from asyncshard.pipeline.arena import PAGE, Arena

MIB = 1 << 20


def test_a_region_comes_back_while_another_is_full():
    arena = Arena(MIB)
    full = [arena.allocate(2 * MIB) for _ in range(3)]
    assert len({extent.region for extent in full}) == 3
    for extent in full:
        arena.free(extent)
    assert arena.resident <= 2 * MIB


def test_resident_bytes_are_those_of_what_is_out_whatever_the_order():
    arena = Arena(MIB)
    out = [arena.allocate(3 * PAGE) for _ in range(1000)]
    assert arena.resident == 3000 * PAGE
    for index, extent in enumerate(out):
        if index % 2:
            arena.free(extent)
    for extent in out[::2]:
        arena.free(extent)
    for extent in arena.take_idle(0):
        arena.free(extent, is_touched=False)
    assert arena.resident == 0
