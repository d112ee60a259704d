"""Compact facts of headers, against plain dicts and sets of names."""

import json

from hypothesis import given
from hypothesis import strategies as st

from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import parse_header
from asyncshard.format.index import parse_index
from asyncshard.plan.check.file_facts import Tensors, facts_of

NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=6) | st.sampled_from(["a", "b", "c", "d\0e"])
FILES = st.lists(
    st.dictionaries(NAMES.filter(lambda name: name != "__metadata__"), st.sampled_from(DTYPES)), max_size=4
)


def facts(number, dtypes, metadata=None, weight_map=None):
    header = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, dtype in dtypes.items():
        header[name] = {"dtype": dtype.name, "shape": [8], "data_offsets": [start, start + dtype.bits]}
        start += dtype.bits
    text = json.dumps(header).encode()
    parsed = parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text) + start)
    return facts_of(f"file-{number}", parsed, parsed, weight_map, None if weight_map is None else number)


@given(FILES)
def test_names_and_sizes_are_kept(files):
    for number, dtypes in enumerate(files):
        kept = facts(number, dtypes)
        assert len(kept) == len(dtypes)
        assert kept.names.at(range(len(dtypes))) == list(dtypes)
        assert kept.names.at([]) == []
        assert kept.nbytes == kept.dtype_bytes.sum() == sum(dtype.bits for dtype in dtypes.values())


@given(FILES)
def test_duplicates_are_the_names_that_an_earlier_file_has(files):
    expected = []
    for number, dtypes in enumerate(files):
        for name in dtypes:
            earlier = [other for other in range(number) if name in files[other]]
            if earlier:
                expected.append((name, f"file-{earlier[-1]}", f"file-{number}"))
    twice, total = Tensors([facts(number, dtypes) for number, dtypes in enumerate(files)]).duplicates()
    assert twice == expected[:20]
    assert total == len(expected)


@given(FILES, FILES)
def test_a_difference_is_that_of_sets(ours, theirs):
    mine = {name: dtype for dtypes in reversed(ours) for name, dtype in dtypes.items()}
    other = {name: dtype for dtypes in theirs for name, dtype in dtypes.items()}
    found = Tensors([facts(0, mine)]).difference(Tensors([facts(0, other)]))
    assert found.lacks == ([name for name in mine if name not in other][:20], len(set(mine) - set(other)))
    assert found.adds == ([name for name in other if name not in mine][:20], len(set(other) - set(mine)))
    retyped = [name for name in mine if name in other and mine[name] != other[name]]
    assert found.retyped == (retyped[:20], len(retyped))


def test_only_metadata_that_ties_an_absent_name_to_a_present_one_is_a_tie():
    ties = {"tied": "a", "a": "b", "both": "nothing"}
    metadata = {"format": "pt", "type": "a", **{f"asyncshard.tie.{name}": stored for name, stored in ties.items()}}
    assert facts(0, dict.fromkeys("ab", DTYPES[0]), metadata).ties == (("tied", "a"),)


def test_any_text_is_a_tie_of_a_name_that_the_index_places_in_the_file():
    text = json.dumps({"weight_map": {"a": "file-0", "type": "file-0", "other": "file-0"}}).encode()
    weight_map = parse_index(text, path="index")
    found = facts(0, {"a": DTYPES[0]}, {"type": "a", "format": "a"}, weight_map)
    assert found.ties == (("type", "a"),)
    assert found.absent == ("other",)
