"""Placements in the metadata of rank shards."""

from __future__ import annotations

import json

import pytest

from asyncshard.errors import FormatError
from asyncshard.plan.division.placement_text import format_placements, parse_placements, parse_world_size
from asyncshard.plan.division.placements import PackedShard, Placement, Replicate, Shard


@pytest.mark.parametrize(
    "placement", [Shard(0), Shard(-1), Shard(1, pieces=4), PackedShard(0, (4, 2, 2)), PackedShard(-1, (0, 3))]
)
def test_placements_are_read_as_they_were_written(placement: Placement) -> None:
    placed = {"t": placement, 'quoted "\\': placement, "ü\U0001f600\ud800": Shard(7)}
    text = format_placements(placed.items())
    assert dict(parse_placements(text, path="x")) == placed
    assert dict(parse_placements(json.dumps(json.loads(text), indent=1), path="x")) == placed


def test_entries_are_read_one_by_one() -> None:
    """A thread that reads very many of them lets others run."""
    entries = parse_placements('{"a": {"dim": 0}, "b": {"dim": 0}, "c"', path="x")
    (first, one), (second, other) = next(entries), next(entries)
    assert (first, second) == ("a", "b")
    assert one is other
    with pytest.raises(FormatError):
        next(entries)


def test_whole_tensors_have_no_entry() -> None:
    assert format_placements([("t", Replicate())]) == "{}"
    assert dict(parse_placements(" {\n} ", path="x")) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 100_000,
        '{"t": {"dim": ' + "[" * 100_000 + "}}",
        "1",
        "{",
        '{"t": {"dim": 0}',
        '{"t": {"dim": 0},}',
        '{"t": {"dim": 0}} {}',
        '{"t\n": {"dim": 0}}',
        '{"t": {"dim": {}}}',
        '{"t": null}',
        '{"t": {}}',
        '{"t": {"dim": 0, "more": 1}}',
        '{"t": {"dim": true}}',
        '{"t": {"dim": 0, "pieces": 0}}',
        '{"t": {"dim": 0, "pieces": 2, "sizes": [1]}}',
        '{"t": {"dim": 0, "sizes": []}}',
        '{"t": {"dim": 0, "sizes": "12"}}',
    ],
)
def test_anything_else_is_an_error_that_names_the_file(text: str) -> None:
    with pytest.raises(FormatError, match="x-of-1"):
        dict(parse_placements(text, path="x-of-1"))


def test_the_world_size_is_a_number_of_ranks() -> None:
    assert parse_world_size({}, path="x") is None
    assert parse_world_size({"asyncshard.world_size": "8"}, path="x") == 8
    for text in ("", "0", "-1", "8.0", "٣", "9" * 40):
        with pytest.raises(FormatError, match="no number of ranks"):
            parse_world_size({"asyncshard.world_size": text}, path="x")
