"""The queue between reads and consumer: order, bounds, items that are given back, errors, and who is woken."""

import asyncio
from typing import NamedTuple

import pytest

from asyncshard.pipeline.transfer.slots import Slots
from asyncshard.plan.items import ReadItem

MIB = 1 << 20


class Memory(NamedTuple):
    """Stands for a lease."""

    nbytes: int


def slots_of(count, *, begun=0, is_ordered=True, nbytes=10):
    slots = Slots(is_ordered=is_ordered)
    slots.plan([ReadItem(0, 10 * number, 10 * number + 10, number, number + 1) for number in range(count)])
    return slots, [slots.begin(Memory(nbytes)) for _ in range(begun)]


def test_slots_are_begun_in_plan_order():
    slots, begun = slots_of(3, begun=3)
    assert [slot.item.first for slot in begun] == [0, 1, 2]
    assert (len(slots), slots.has_items_left) == (3, False)


def test_an_ordered_consumer_waits_for_the_first_slot_and_another_takes_any():
    for is_ordered in (True, False):
        slots, begun = slots_of(2, begun=2, is_ordered=is_ordered)
        slots.finish(begun[1], None)
        assert slots.find_done() is (None if is_ordered else begun[1])
        slots.finish(begun[0], None)
        assert slots.find_done() is begun[0]


def test_slots_are_fed_when_all_are_done_and_exhausted_when_all_are_taken():
    slots, (slot,) = slots_of(1, begun=1)
    assert (slots.is_fed, slots.is_exhausted) == (False, False)
    slots.finish(slot, None)
    assert (slots.is_fed, slots.is_exhausted) == (True, False)
    assert slots.take(slot)
    assert (slots.is_fed, slots.is_exhausted) == (True, True)


def test_a_checkpoint_without_items_is_exhausted_at_once():
    slots, _ = slots_of(0)
    assert (slots.is_fed, slots.is_exhausted, slots.has_items_left) == (True, True, False)


@pytest.mark.parametrize(("nbytes", "begun", "is_enough"), [(10, 1, False), (10, 2, True), (16 * MIB, 1, True)])
def test_reading_ahead_is_bounded_in_items_and_in_bytes(nbytes, begun, is_enough):
    slots, _ = slots_of(5, begun=begun, nbytes=nbytes)
    assert slots.is_far_enough(2) == is_enough


def test_the_slot_that_is_handed_over_does_not_count_as_read_ahead():
    slots, begun = slots_of(3, begun=2)
    slots.handing_over = begun[0]
    assert not slots.is_far_enough(2)


def test_the_newest_slot_is_given_back_and_its_item_comes_again():
    slots, begun = slots_of(3, begun=2)
    for slot in begun:
        slots.finish(slot, None)
    assert slots.give_back()
    assert (len(slots), slots.next_item, begun[1].lease) == (1, 1, None)
    assert slots.slot_freed.is_set()
    assert slots.begin(None).item.first == 1


def test_a_slot_that_frees_no_memory_is_not_given_back():
    slots, _ = slots_of(1)
    assert not slots.give_back()
    slot = slots.begin(Memory(10))
    assert not slots.give_back()  # it is being read
    slots.finish(slot, None)
    slots.handing_over = slot
    assert not slots.give_back()
    slots.handing_over, slot.lease = None, None
    assert not slots.give_back()


def test_an_item_before_one_that_was_taken_is_not_given_back():
    slots, begun = slots_of(2, begun=2, is_ordered=False)
    for slot in begun:
        slots.finish(slot, None)
    slots.take(begun[1])
    assert not slots.give_back()


def test_slots_whose_read_was_stopped_are_unread():
    slots, begun = slots_of(3, begun=3)
    slots.finish(begun[1], None)
    assert list(slots.unread()) == [begun[0], begun[2]]


def test_a_failed_read_frees_its_memory_and_no_further_read_begins():
    slots, (slot,) = slots_of(2, begun=1)
    error = OSError()
    slots.finish(slot, error)
    assert (slot.error, slot.lease, slot.is_done) == (error, None, True)
    assert (slots.has_failed, slots.has_items_left, slots.slot_ready.is_set()) == (True, False, True)


def test_an_error_without_an_item_comes_after_the_items_that_were_read():
    slots, (slot,) = slots_of(2, begun=1)
    slots.finish(slot, None)
    slots.fail(OSError("late"))
    assert slots.find_done() is slot
    slots.take(slot)
    last = slots.find_done()
    assert (last.item, str(last.error)) == (None, "late")


def test_a_slot_of_a_cleared_queue_cannot_be_taken():
    slots, (slot,) = slots_of(1, begun=1)
    slots.clear()
    assert not slots.take(slot)
    assert len(slots) == 0


async def test_taking_a_slot_wakes_the_reader():
    slots, (slot,) = slots_of(1, begun=1)
    slots.finish(slot, None)
    waiting = asyncio.ensure_future(slots.until_freed())
    await asyncio.sleep(0)
    assert not waiting.done()
    slots.take(slot)
    await waiting
