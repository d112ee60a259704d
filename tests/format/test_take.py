"""`Header.take` and `HeaderTable.take`, against the header that is written and parsed in the long way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncshard._core import HeaderTable
from asyncshard.format.dtypes import DTYPES, by_name
from asyncshard.format.header import Header, format_header, parse_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def nbytes_of(dtype, shape):
    return math.prod(shape) * by_name[dtype].bits // 8


def header_of(tensors, metadata=None):
    facts = [(name, dtype, shape, nbytes_of(dtype, shape)) for name, dtype, shape in tensors]
    text = format_header(facts, metadata)
    return parse_header(text, len(text) + sum(nbytes for *_, nbytes in facts))


def rows_of(header):
    return [(*tensor[:3], tensor.start - header.size, tensor.stop - header.size) for tensor in header.values()]


def taken(header, rows, shapes, kinds=None, **options):
    kinds = range(len(rows)) if kinds is None else kinds
    return header.take(np.array(rows, np.int64), shapes, np.array(kinds, np.int32), **options)


@st.composite
def shapes_of_whole_bytes(draw):
    return (*draw(st.lists(st.integers(0, 5), max_size=3)), draw(st.sampled_from([0, 4, 8])))


@st.composite
def tables(draw):
    names = draw(st.lists(NAMES, unique=True, max_size=8))
    return [(name, draw(st.sampled_from(DTYPES)).name, draw(shapes_of_whole_bytes())) for name in names]


@given(tables(), st.data())
def test_taken_rows_are_those_of_a_header_written_for_them(tensors, draw):
    rows = draw.draw(st.permutations(range(len(tensors)))) if tensors else []
    rows = rows[: draw.draw(st.integers(0, len(rows)))]
    shapes = draw.draw(st.lists(shapes_of_whole_bytes(), min_size=1, max_size=4))
    kinds = [draw.draw(st.integers(0, len(shapes) - 1)) for _ in rows]
    metadata = draw.draw(st.dictionaries(TEXTS, TEXTS, max_size=3))
    names = draw.draw(st.none() | st.lists(NAMES, unique=True, min_size=len(rows), max_size=len(rows)))
    header = header_of(tensors)
    found = taken(header, rows, shapes, kinds, metadata=metadata, names=names)
    called = names if names is not None else [header.at(row).name for row in rows]
    expected = header_of(
        [(name, header.at(row).dtype, shapes[kind]) for name, row, kind in zip(called, rows, kinds, strict=True)],
        metadata,
    )
    # Empty tensors may share a place with others, and are then sorted by a parser.
    assert sorted(rows_of(found)) == sorted(rows_of(expected))
    assert [found.table.find(name) for name in called] == list(range(len(rows)))
    assert found.metadata == metadata
    assert found.size == header.size
    assert found.file_size - found.size == expected.file_size - expected.size


def test_a_table_of_all_rows_equals_the_table_and_outlives_it():
    header = header_of([("a", "F32", (2, 3)), ("b.0", "BF16", ()), ("b.1", "U8", (0, 2**64 - 1))], {"format": "pt"})
    before = list(header.values())
    again = taken(header, range(3), [tensor.shape for tensor in before], metadata=header.metadata)
    kinds = [column.tolist() for column in header.table.kinds("parts")]
    columns = header.table.dtype_codes.tolist(), header.table.starts.tolist(), header.table.stops.tolist()
    size = header.file_size
    del header
    assert list(again.values()) == before
    assert [column.tolist() for column in again.table.kinds("parts")] == kinds
    assert (again.table.dtype_codes.tolist(), again.table.starts.tolist(), again.table.stops.tolist()) == columns
    assert again.file_size == size
    assert again.table.find("c") == -1
    for column in (again.table.starts, again.table.dtype_codes):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


def test_a_shape_that_many_rows_share_is_kept_once():
    header = header_of([(f"t{number}", "U8", (1 << 20,)) for number in range(1000)])
    found = taken(header, range(1000), [(1 << 20,)], [0] * 1000)
    assert found.nbytes < header.nbytes - 999 * 3
    assert found["t999"].shape == (1 << 20,)


HEADER = header_of([("a", "F32", (2,)), ("b", "F4", (4,)), ("c" * 100, "U8", (1,))])


@pytest.mark.parametrize(
    ("rows", "shapes", "options", "error", "message"),
    [
        ([3], [(1,)], {}, IndexError, "no tensor 3 among 3"),
        ([-1], [(1,)], {}, IndexError, "no tensor -1 among 3"),
        ([0], [(1,)], {"kinds": [1]}, IndexError, "no shape 1 for tensor 'a'"),
        ([0], [(1,)], {"kinds": [-1]}, IndexError, "no shape -1 for tensor 'a'"),
        ([0, 0], [(1,), (1,)], {}, ValueError, "two tensors would be called 'a'"),
        ([2, 2], [(1,), (1,)], {}, ValueError, "two tensors would be called 'ccc"),
        ([0, 1], [(1,), (2,)], {"names": ["x", "x"]}, ValueError, "two tensors would be called 'x'"),
        ([0], [(1,)], {"names": ["x", "y"]}, ValueError, "a name for each row"),
        ([0], [(1,)], {"kinds": [0, 0]}, ValueError, "each row is taken once"),
        ([0, 1, 2, 0], [(1,)], {"kinds": [0] * 4}, ValueError, "each row is taken once"),
        ([1], [(3,)], {}, ValueError, "tensor 'b' would end within a byte"),
        ([0], [(-1,)], {}, ValueError, "a dimension is from 0 to"),
        ([0], [(2**64,)], {}, ValueError, "a dimension is from 0 to"),
        ([0], [(2**40, 2**40)], {}, ValueError, "too many elements"),
        ([0], [(2**61,)], {}, ValueError, "would end beyond"),
        ([0, 2], [(2**61 - 8,), (1000,)], {}, ValueError, "would end beyond"),
        ([0], [(1,)], {"names": [5]}, TypeError, "argument"),
        ([0], [(1,)], {"metadata": {"a": 5}}, TypeError, "argument"),
        ([0], [(1,)], {"metadata": {"a": "\ud800"}}, ValueError, "surrogates"),
    ],
)
def test_rows_that_no_file_could_hold_are_refused(rows, shapes, options, error, message):
    with pytest.raises(error, match=message):
        taken(HEADER, rows, shapes, **options)


def test_columns_of_other_types_are_refused():
    rows, kinds = np.zeros(1, np.int64), np.zeros(1, np.int32)
    for arguments in ((rows.astype(np.int32), [()], kinds), (rows, [()], rows), (np.zeros((1, 1)), [()], kinds)):
        with pytest.raises(ValueError, match="Buffer"):
            HEADER.take(*arguments)
    with pytest.raises(TypeError):
        HEADER.take(None, [()], kinds)
    with pytest.raises(ValueError, match="data_start"):
        HEADER.table.take(rows, [()], kinds, data_start=-1, metadata={})


def test_a_taken_header_is_a_header():
    found = taken(HEADER, [], [])
    assert isinstance(found, Header)
    assert isinstance(found.table, HeaderTable)
    assert (len(found), found.file_size, found.metadata) == (0, HEADER.size, {})
    assert "a" not in found
