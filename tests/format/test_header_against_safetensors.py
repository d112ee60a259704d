"""safetensors' own parser is the oracle: both accept the same headers and find the same tensors in them.

The exceptions, all on purpose:

- a tensor name or a metadata key that occurs twice, an entry written as an array, a dtype written as an object and
  ``"__metadata__": null`` are refused here and accepted there (`stricter_point`);
- a decimal that lies within a rounding of the largest double may be refused there, where the reading of numbers is
  inexact; what counts here is the double nearest to it. The strategies below make none.
"""

import json
import random

import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncshard.errors import FormatError
from asyncshard.format.dtypes import DTYPES
from asyncshard.format.header import parse_header

THOROUGH = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

SPACE = st.text(" \t\r\n", max_size=2) | st.just("")
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["", "a", "b", "dtype", "__metadata_", "é", "😀", '"', "\\", "\0", "x" * 300]
)
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8]), max_size=3)
JUNK = st.recursive(
    st.sampled_from(
        ["null", "true", "0", "-0", "1.5e3", "0e999", "1e-999", "1e999", "12345678901234567890123", '"\\ud800"']
    )
    | st.integers().map(str)
    | st.floats(-1e300, 1e300).map(repr)
    | NAME.map(json.dumps),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: "[" + ",".join(values) + "]")
        | st.lists(inner, max_size=3).map(lambda values: "{" + ",".join(f'"k":{value}' for value in values) + "}")
    ),
    max_leaves=5,
)
FRAGMENTS = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"1", b"-", b".", b"e9", b"\\", b"\\u00", b"\\ud83d", b"\xff",
    b"\xc3",
    b"\xed\xa0\x80", b" ", b"\0", b"\x0b", b"null", b"18446744073709551615", b"18446744073709551616", b"1.0", b"0,",
    b"F4",
    b'"dtype":"U8",', b'"__metadata__":null,', b'"__metadata__":{"a":"b"},', b'"shape":[0],', b'"a":1,',
    b"\xef\xbb\xbf",
]  # fmt: skip


@st.composite
def spelled(draw, text):
    """A JSON string that means `text`, with as many escapes as comes."""
    pieces = []
    for character in text:
        units = character.encode("utf-16-be")
        escaped = "".join(f"\\u{int.from_bytes(units[i : i + 2], 'big'):04x}" for i in range(0, len(units), 2))
        plain = [] if character in '"\\' or character < " " else [character]
        pieces.append(draw(st.sampled_from([*plain, json.dumps(character)[1:-1], escaped])))
    return '"' + "".join(pieces) + '"'


@st.composite
def joined(draw, members, opening, closing):
    text = opening + draw(SPACE)
    for i, member in enumerate(members):
        text += (draw(SPACE) + "," + draw(SPACE) if i else "") + member
    return text + draw(SPACE) + closing


@st.composite
def entries(draw, begin):
    """One entry's object and where its data ends."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(SIZES)
    elements = 1
    for size in shape:
        elements *= size
    if elements * dtype.bits % 8:
        shape, elements = [*shape, 4], elements * 4
    end = begin + elements * dtype.bits // 8
    fields = [
        draw(spelled("dtype")) + draw(SPACE) + ":" + draw(SPACE) + draw(spelled(dtype.name)),
        draw(spelled("shape")) + ":" + draw(joined([str(size) for size in shape], "[", "]")),
        draw(spelled("data_offsets")) + ":" + draw(joined([str(begin), str(end)], "[", "]")),
    ]
    if draw(st.integers(0, 4)) == 0:
        fields.append(draw(spelled(draw(st.sampled_from(["", "x", "Shape"])))) + ":" + draw(JUNK))
    return draw(joined(draw(st.permutations(fields)), "{", "}")), end


@st.composite
def headers(draw):
    """The text of a header, valid but perhaps for an ignored field or a name that occurs twice, and its data's size."""
    members, end = [], 0
    for name in draw(st.lists(NAME, max_size=4)):
        entry, end = draw(entries(end))
        members.append(draw(spelled(name)) + draw(SPACE) + ":" + draw(SPACE) + entry)
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(NAME, NAME, max_size=3))
        pairs = [draw(spelled(key)) + ":" + draw(spelled(value)) for key, value in metadata.items()]
        members.append(draw(spelled("__metadata__")) + ":" + draw(joined(pairs, "{", "}")))
    text = draw(SPACE) + draw(joined(draw(st.permutations(members)), "{", "}")) + draw(SPACE)
    return text.encode(), end


def damaged(text, rng):
    """The text of a header with a few bytes cut, put in, replaced or repeated."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        start = rng.randint(0, len(text))
        stop = start + rng.choice([0, 0, 1, 1, 2, 5, 20])
        again = rng.randint(0, len(text))
        repeated = text[again : again + rng.choice([1, 5, 40])]
        fragment = rng.choice([b"", b"", repeated, rng.randbytes(1), rng.choice(FRAGMENTS)])
        text = text[:start] + fragment + text[stop:]
    return text


def stricter_point(text):
    """Say which rule of ours a header breaks that the reference accepts, judged without our parser; None if none."""
    names = set()
    for name, value in json.loads(text, object_pairs_hook=tuple):
        if name in names:
            return "a name twice"
        names.add(name)
        if name == "__metadata__":
            if value is None:
                return "metadata null"
            if len(dict(value)) < len(value):
                return "a metadata key twice"
        elif isinstance(value, list):
            return "an entry as an array"
        elif isinstance(dict(value)["dtype"], tuple):
            return "a dtype as an object"
    return None


def compare(text, size):
    octets = len(text).to_bytes(8, "little") + text + bytes(i % 251 for i in range(size))
    try:
        expected = {
            name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(octets)
        }
    except safetensors.SafetensorError:
        expected = None
    try:
        header = parse_header(octets)
    except FormatError as error:
        header, refusal = None, error
    if header is None:
        assert 0 <= refusal.offset <= len(octets)
        assert expected is None or stricter_point(text), str(refusal)
        return
    assert expected == {
        name: (tensor.dtype, tensor.shape, octets[tensor.start : tensor.stop]) for name, tensor in header.items()
    }
    assert header.metadata == json.loads(text).get("__metadata__", {})
    assert sorted(range(len(header)), key=lambda i: header.at(i)[3:]) == list(range(len(header)))
    assert [header.table.find(name) for name in header] == list(range(len(header)))


@THOROUGH
@given(headers())
def test_valid_headers_mean_the_same(header):
    compare(*header)


@THOROUGH
@given(headers(), st.integers(0, 2**32))
def test_damaged_headers_are_refused_alike(header, seed):
    text, size = header
    rng = random.Random(seed)  # hypothesis draws the header, and this the damage: many for the price of one
    for _ in range(100):
        compare(damaged(text, rng), size + (rng.random() < 0.05))


@THOROUGH
@given(st.binary(max_size=40), st.integers(0, 3))
def test_any_octets_are_refused_alike(text, size):
    compare(text, size)


@THOROUGH
@given(JUNK, st.lists(st.sampled_from("[{"), max_size=130))
def test_ignored_values_are_judged_alike(value, levels):
    for opening in levels:
        value = f"[{value}]" if opening == "[" else f'{{"k":{value}}}'
    text = f'{{"a":{{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":{value}}}}}'
    compare(text.encode(), 0)
