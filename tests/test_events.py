"""Events are values: compared by what they say, never changed, and safe to send to another thread or process."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import typing

import pytest

from asyncshard import events
from asyncshard.events import Closed, Delivered, Event, Opened, ReadEnded, ReadStarted, Retried, Unverified, Verified

EVENTS: list[Event] = [
    Opened(3, 300, ("missing",), ("unexpected",)),
    ReadStarted("s3://bucket/a", 0, 100),
    ReadEnded("s3://bucket/a", 0, 100),
    Retried("s3://bucket/a", "the server failed", 0.5, 1, 503, "id"),
    Verified("s3://bucket/a"),
    Unverified("s3://bucket/a"),
    Delivered(2, 200),
    Closed(),
]


def test_every_event_of_the_module_is_one_that_listeners_are_told_to_expect() -> None:
    made = {item for item in vars(events).values() if inspect.isclass(item) and item.__module__ == events.__name__}
    assert made == set(typing.get_args(Event)) == {type(event) for event in EVENTS}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_is_equal_to_its_copy_alone(event: Event) -> None:
    copy = pickle.loads(pickle.dumps(event))
    assert copy == event
    assert hash(copy) == hash(event)
    assert [other for other in EVENTS if other == event] == [event]


@pytest.mark.parametrize("event", EVENTS[:-1], ids=lambda event: type(event).__name__)
def test_a_listener_cannot_change_an_event_under_another_one(event: Event) -> None:
    field = dataclasses.fields(event)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, field, None)
    assert not hasattr(event, "__dict__")
