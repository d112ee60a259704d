"""`HeaderTable.kinds` and `WeightMap.kinds`, against the rule in plain Python."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard import parse_header
from asyncshard._core import parse_weight_map
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import format_header
from asyncshard.plan.division.placements import Shard
from asyncshard.plan.tp.plan import TpPlan
from asyncshard.plan.tp.rules import RuleIndex

SPELLINGS = {
    "": lambda name: "",
    "parts": lambda name: ".".join("*" if re.fullmatch("[0-9]+", part) else part for part in name.split(".")),
    "digits": lambda name: re.sub("[0-9]+", "*", name),
}
NAMES = st.lists(st.text("01*.wé²٣", max_size=9), unique=True, max_size=30)
SHAPES = st.lists(st.integers(0, 3) | st.just(2**64 - 1), max_size=3).map(lambda sizes: (0, *sizes))


def numbered(keys):
    """The number of each key in order of first mention, and where each number is first."""
    first = {}
    numbers = [first.setdefault(key, (len(first), index))[0] for index, key in enumerate(keys)]
    return numbers, [index for _, index in first.values()]


def weight_map_of(names):
    return parse_weight_map(json.dumps({"weight_map": dict.fromkeys(names, "x.safetensors")}).encode(), max_entries=100)


@given(NAMES, st.data(), st.sampled_from(sorted(SPELLINGS)))
def test_tensors_of_a_kind_are_those_of_one_dtype_and_shape_with_names_alike(names, data, spelling):
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES[:3]), min_size=len(names), max_size=len(names)))
    shapes = data.draw(st.lists(SHAPES, min_size=len(names), max_size=len(names)))
    text = format_header((name, dtype.name, shape, 0) for name, dtype, shape in zip(names, dtypes, shapes, strict=True))
    header = parse_header(text)
    kinds, firsts = header.table.kinds(spelling)
    in_file = [header.at(index) for index in range(len(header))]
    wanted = numbered([(info.dtype, info.shape, SPELLINGS[spelling](info.name)) for info in in_file])
    assert (kinds.tolist(), firsts.tolist()) == wanted
    assert (kinds.dtype, firsts.dtype) == (np.int32, np.int64)


@given(NAMES, st.sampled_from(sorted(SPELLINGS)))
def test_a_weight_map_knows_names_alone(names, spelling):
    kinds, firsts = weight_map_of(names).kinds(spelling)
    assert (kinds.tolist(), firsts.tolist()) == numbered(map(SPELLINGS[spelling], names))


def test_an_unknown_spelling_is_an_error():
    with pytest.raises(ValueError, match="no such spelling of names: 'all'"):
        weight_map_of(["a"]).kinds("all")
    with pytest.raises(TypeError):
        weight_map_of(["a"]).kinds([])


@given(NAMES, st.lists(st.text("01*.w", min_size=1, max_size=9), max_size=4))
def test_names_of_a_kind_are_matched_by_the_same_rules(names, keys):
    plan = TpPlan({key: Shard(0) for key in keys})
    table = weight_map_of(names)
    kinds, firsts = RuleIndex(plan.rules).kinds(table)
    assert plan.match(plan.samples([table])).unused == plan.match(names).unused
    unmatched = set(plan.match(names).unmatched)
    assert [name in unmatched for name in names] == [names[firsts[kind]] in unmatched for kind in kinds]
