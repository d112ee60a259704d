"""Each rule of the header, one by one; agreement with safetensors is in test_header_against_safetensors.py."""

import os
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from asyncshard._core import HeaderTable, duplicate_names
from asyncshard.errors import FormatError
from asyncshard.format.header import Header, TensorInfo, header_size, parse_header

GOOD = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def file_of(text, nbytes=0):
    octets = text if isinstance(text, bytes) else text.encode()
    return len(octets).to_bytes(8, "little") + octets + bytes(nbytes)


def parsed(text, nbytes=0, **options) -> Header:
    return parse_header(file_of(text, nbytes), **options)


def refused(text, nbytes=0, **options) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parsed(text, nbytes, path="w.safetensors", **options)
    assert str(caught.value).startswith("w.safetensors: ")
    assert caught.value.path == "w.safetensors"
    return caught.value


def entry(dtype="U8", shape="[0]", offsets="[0,0]", extra=""):
    return f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{extra}}}}}'


def ignored(value):
    """A valid header around `value`, in a field that is ignored at the third level."""
    return entry(extra=f',"ignored":{value}')


# --- what a header gives


def test_tensors_come_in_the_order_of_their_bytes_with_ranges_of_the_file():
    text = (
        '{"z":{"dtype":"F32","shape":[2,1],"data_offsets":[1,9]},"__metadata__":{"format":"pt"},'
        '"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}'
    )
    header = parsed(text, 9)
    assert list(header) == ["a", "z"]
    assert header.size == 8 + len(text)
    assert header.file_size == header.size + 9
    assert header["z"] == header.at(1) == TensorInfo("z", "F32", (2, 1), header.size + 1, header.size + 9)
    assert header["z"].nbytes == 8
    assert header["a"].shape == ()
    assert header.metadata == {"format": "pt"}
    assert "a" in header
    assert "b" not in header
    assert 5 not in header
    assert header.nbytes > 0


def test_columns_are_those_of_the_rows_and_cannot_be_written():
    text = f'{{"b":{{"dtype":"I16","shape":[3],"data_offsets":[1,7]}},"a":{GOOD}}}'
    table = parsed(text, 7).table
    assert table.starts.dtype == table.stops.dtype == np.int64
    assert [table.row(i)[3:] for i in range(2)] == list(zip(table.starts, table.stops, strict=True))
    assert table.dtype_codes.tolist() == [4, 11]
    for column in (table.starts, table.stops, table.dtype_codes):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 0


@pytest.mark.parametrize("index", [-1, 1, 2**40])
def test_an_index_outside_the_table_is_an_error(index):
    table = parsed(f'{{"a":{GOOD}}}', 1).table
    with pytest.raises(IndexError):
        table.row(index)
    with pytest.raises(IndexError):
        table.name(index)


def test_an_absent_name_is_a_key_error():
    header = parsed(f'{{"a":{GOOD}}}', 1)
    for name in ("", "A", "a\0", "aa", "\ud800"):
        assert name not in header
        with pytest.raises(KeyError):
            header[name]
    with pytest.raises(TypeError):
        header.table.find(b"a")


def test_a_table_cannot_be_made_by_hand():
    with pytest.raises(TypeError):
        HeaderTable()


def test_names_may_be_any_string():
    names = ["", "é", "😀", '"', "\\", "../x", "\n", "a\0b", "x" * 100_000, "__metadata", "\uffff"]
    members = [f'"{name}":{EMPTY}' for name in names if name not in ('"', "\\", "\n", "a\0b")]
    members += [f'"{spelled}":{EMPTY}' for spelled in ('\\"', "\\\\", "\\n", "a\\u0000b")]
    header = parsed("{" + ",".join(members) + "}")
    assert sorted(header) == sorted(names)
    assert all(header[name].name == name for name in names)


def test_every_escape_means_its_character():
    header = parsed(f'{{"\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC\\ud83d\\ude00":{EMPTY}}}')
    assert list(header) == ['"\\/\b\f\n\r\tAé€😀']


def test_keys_and_types_may_be_spelled_with_escapes():
    text = '{"\\u005f_metadata__":{"k":"v"},"a":{"\\u0064type":"\\u00558","shape":[1],"data_offse\\u0074s":[0,1]}}'
    header = parsed(text, 1)
    assert header.metadata == {"k": "v"}
    assert header["a"].dtype == "U8"


def test_many_tensors_in_any_order_come_sorted():
    count = 5000
    order = list(range(count))
    random.Random(7).shuffle(order)
    ends = [int(end) for end in np.cumsum([i % 3 for i in range(count)])]
    spans = [
        f'"t{i}":{{"dtype":"U8","shape":[{i % 3}],"data_offsets":[{ends[i] - i % 3},{ends[i]}]}}' for i in range(count)
    ]
    header = parsed("{" + ",".join(spans[i] for i in order) + "}", ends[-1])
    places = {i: place for place, i in enumerate(order)}
    expected = sorted(range(count), key=lambda i: (ends[i] - i % 3, ends[i], places[i]))
    assert list(header) == [f"t{i}" for i in expected]
    assert all(header.at(i).name == name and header.table.find(name) == i for i, name in enumerate(header))


def test_empty_tensors_at_one_offset_keep_their_place_in_the_header():
    names = ["e", "c", "full", "d"]
    members = [f'"{name}":{GOOD if name == "full" else EMPTY}' for name in names]
    assert list(parsed("{" + ",".join(members) + "}", 1)) == ["e", "c", "d", "full"]


def test_parsing_keeps_no_reference_to_the_input():
    buffer = bytearray(file_of(f'{{"a":{GOOD}}}', 1))
    header = parse_header(buffer)
    buffer.clear()  # a BufferError if something still exported it
    assert header["a"].nbytes == 1


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda octets: np.frombuffer(octets, np.uint8)])
def test_a_header_is_parsed_from_any_kind_of_buffer(kind):
    assert list(parse_header(kind(file_of(f'{{"a":{GOOD}}}', 1)))) == ["a"]


def test_headers_parse_in_several_threads_at_once():
    text = (
        "{" + ",".join(f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(2000)) + "}"
    )
    octets = file_of(text, 2000)
    found = []
    threads = [threading.Thread(target=lambda: found.append(list(parse_header(octets)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"t{i}" for i in range(2000)]] * 4


# --- rules 1 to 3: the length


@pytest.mark.parametrize("size", range(8))
def test_a_file_of_less_than_8_bytes_is_refused(size):
    with pytest.raises(FormatError, match="at least 8 bytes"):
        parse_header(bytes(size))


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1, 2**64 - 8])
def test_a_length_above_the_limit_is_refused_before_anything_is_read(length):
    with pytest.raises(FormatError, match="limit of 100000000"):
        header_size(length.to_bytes(8, "little"), 2**62, path="x")
    with pytest.raises(FormatError):
        parse_header(length.to_bytes(8, "little") + b"{}")


def test_a_length_at_the_limit_is_allowed():
    assert header_size((100_000_000).to_bytes(8, "little"), 2**40) == 100_000_008


def test_a_length_beyond_the_file_is_refused():
    assert header_size((92).to_bytes(8, "little"), 100) == 100
    with pytest.raises(FormatError, match="cut short"):
        header_size((93).to_bytes(8, "little"), 100)


def test_max_header_bytes_refuses_more_and_never_less():
    prefix = (1000).to_bytes(8, "little")
    assert header_size(prefix, 5000, max_header_bytes=1000) == 1008
    with pytest.raises(FormatError, match="max_header_bytes=999"):
        header_size(prefix, 5000, max_header_bytes=999)
    with pytest.raises(FormatError, match="format's limit"):
        header_size((100_000_001).to_bytes(8, "little"), 2**40, max_header_bytes=2**40)
    assert "max_header_bytes=10" in str(refused(f'{{"a":{GOOD}}}', 1, max_header_bytes=10))


def test_data_that_ends_within_the_header_of_a_longer_file_is_the_callers_mistake():
    octets = file_of(f'{{"a":{GOOD}}}', 1)
    with pytest.raises(ValueError, match="first 61 bytes") as caught:
        parse_header(octets[:20], len(octets))
    assert not isinstance(caught.value, FormatError)
    with pytest.raises(ValueError, match="first 8 bytes"):
        header_size(b"abc", 100)


def test_the_header_alone_is_enough_when_the_file_size_is_given():
    octets = file_of(f'{{"a":{GOOD}}}', 1)
    assert list(parse_header(octets[:-1], len(octets))) == ["a"]


# --- rule 4: UTF-8


@pytest.mark.parametrize(
    "octets",
    [
        b"\x80", b"\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xc3", b"\xc3(", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xe2\x82",
        b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80",
        b"\xf5\x80\x80\x80",
        b"\xf0\x9f\x98", b"\xfe", b"\xff", b"\xe2\x82\xc0", b"\xf0\x9f\x98\xff",
    ],
)  # fmt: skip
def test_octets_that_are_not_utf8_are_refused_wherever_they_stand(octets):
    for text in (b'{"%s":' + EMPTY.encode() + b"}", b'{"__metadata__":{"k":"%s"}}', ignored('"%s"').encode(), b"{}%s"):
        for padding in (b"", b"\xc3\xa9", b"1234567"):
            error = refused(text.replace(b"%s", padding + octets))
            assert "UTF-8" in str(error)
            assert error.offset == 8 + text.index(b"%s") + len(padding)


@pytest.mark.parametrize("character", "\x7f\x80\u07ff\u0800\ud7ff\ue000\uffff\U00010000\U0010ffff")
def test_the_ends_of_each_range_of_utf8_are_allowed(character):
    assert list(parsed(f'{{"{character}":{EMPTY}}}')) == [character]


# --- rule 5: JSON

NOT_JSON = [
    "", " ", "{", '{"a"', '{"a":', "{} {}", "{}x", "{},", "/**/{}", "{}//", '{"a" 1}', "{'a':1}", "{a:1}", "\ufeff{}",
    "\x0b{}", "\xa0{}", "{}\0", "{,}", "[", "nul",
]  # fmt: skip
NOT_VALUES = [
    "", "01", "-", "-01", "+1", ".5", "1.", "1.e5", "1e", "1e+", "0x1", "1_0", "NaN", "Infinity", "-Infinity", "tru",
    "True", "truex", "nulL", "[1,]", "[,1]", "[1 2]", "[", "]", "[1}", '{"a":1,}', '{"a":1]', '{,"a":1}', '{"a"}',
    "{1:2}",
    '{"a":1 "b":2}', '"', '"\\"', '"\\x"', '"\\u12"', '"\\u12g4"', '"\\u+123"', '"\t"', '"\n"', '"\0"', '"a\x1fb"',
    '"\\ud800"', '"\\udc00"', '"\\ud800x"', '"\\ud800\\n"', '"\\ud800\\u0041"', '"\\ud800\\ud800"', '"\\ud800\\udbff"',
    '"\\n\n"', '"\\', "1e309", "-1e309", "1" + "0" * 309, "1e99999999999999999999", "0.1e310", "1.8e308",
    str(2**1024 - 2**970), str(2**1024 - 2**970) + ".0", "0." + "0" * 50 + "1e400",
]  # fmt: skip
VALUES = [
    "0", "-0", "-0.0", "0e999", "0.000e99999999999999999999", "1e308", "-1e308", "1e-400", "1e-99999999999999999999",
    "1E+5", "1e05", "1.7976931348623157e308", "17976931348623157" + "0" * 292, "123456789012345678901234567890", "0.0",
    str(2**1024 - 2**971 - 10**292), "0." + "0" * 400 + "1e700", "1" + "0" * 400 + "e-200", "true", "false", "null",
    '""',
    '"\\ud83d\\ude00"', '"\\u0000"', '"\x7f"', "[]", "{}", "[ ]", "{ }", "[[],{}]", '{"a":1,"a":2}',
    '[1,"x",null,[true]]',
]  # fmt: skip


@pytest.mark.parametrize("text", NOT_JSON)
def test_a_text_that_is_not_one_json_document_is_refused(text):
    refused(text)


@pytest.mark.parametrize("value", NOT_VALUES)
def test_a_field_that_is_ignored_must_still_be_json(value):
    error = refused(ignored(value))
    assert error.tensor == "a"
    assert 8 <= error.offset <= len(file_of(ignored(value)))


@pytest.mark.parametrize("value", VALUES)
def test_a_field_that_is_ignored_may_be_any_json(value):
    assert list(parsed(ignored(value))) == ["a"]


def test_a_decimal_that_rounds_to_the_largest_double_is_in_its_range():
    for value in ("1.7976931348623158e308", str(2**1024 - 2**970 - 1), "0.17976931348623158e309"):
        assert float(value) < float("inf")
        assert list(parsed(ignored(value))) == ["a"]


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"k":', "}"), ('[{"k":', "}]")])
def test_127_levels_are_read_and_the_128th_is_refused(opening, closing):
    levels = opening.count("[") + opening.count("{")
    most = 125 // levels  # two are the header's own
    value = opening * most + "[" * (125 - most * levels) + "1" + "]" * (125 - most * levels) + closing * most
    assert list(parsed(ignored(value))) == ["a"]
    assert "127 levels" in str(refused(ignored(f"[{value}]")))
    assert "127 levels" in str(refused(ignored("[" * 200_000)))


def test_white_space_may_stand_between_any_two_tokens_and_around_them():
    space = " \t\r\n"
    tokens = '{ "__metadata__" : { "k" : "v" } , "a" : { "dtype" : "U8" , "x" : [ 1 , { } ] , "shape" : [ 1 , 1 ] , '
    tokens += '"data_offsets" : [ 0 , 1 ] } }'
    header = parsed(space + tokens.replace(" ", space) + space, 1)
    assert header["a"].shape == (1, 1)


def test_a_file_cut_at_any_byte_is_refused():
    octets = file_of(f'{{"__metadata__":{{"k":"v"}},"é\\n":{GOOD}}}', 1)
    assert len(parse_header(octets)) == 1
    for size in range(len(octets)):
        with pytest.raises(FormatError):
            parse_header(octets[:size])


def test_a_text_cut_at_any_byte_is_refused():
    text = f'{{"__metadata__":{{"k":"v"}},"é\\ud83d\\ude00":{ignored("[1.5e3,true]")[5:-1]}}}'.encode()
    assert len(parsed(text)) == 1
    for size in range(len(text)):
        refused(text[:size])


# --- rule 6: the objects


@pytest.mark.parametrize("text", ["[]", "1", '"a"', "null", "true"])
def test_the_top_level_must_be_an_object(text):
    assert "top level" in str(refused(text))


def test_a_header_may_be_empty():
    header = parsed("{}")
    assert (len(header), list(header), header.metadata) == (0, [], {})
    assert header.table.starts.shape == header.table.stops.shape == header.table.dtype_codes.shape == (0,)
    refused("{}", 1)


@pytest.mark.parametrize("value", ["null", "1", '"U8"', "[]", '["U8",[0],[0,0]]', "true"])
def test_an_entry_must_be_an_object(value):
    error = refused(f'{{"a":{value}}}')
    assert "tensor 'a': the entry is not a JSON object" in str(error)
    assert (error.tensor, error.offset) == ("a", 13)


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_each_field_is_required_and_may_not_occur_twice(field):
    fields = {"dtype": '"U8"', "shape": "[0]", "data_offsets": "[0,0]"}
    less = ",".join(f'"{key}":{value}' for key, value in fields.items() if key != field)
    assert f"the entry has no {field}" in str(refused(f'{{"a":{{{less}}}}}'))
    more = f'{less},"{field}":{fields[field]},"{field}":{fields[field]}'
    assert "field of the entry occurs twice" in str(refused(f'{{"a":{{{more}}}}}'))


def test_unknown_fields_are_ignored_even_twice():
    assert list(parsed(entry(extra=',"x":1,"x":2,"":3,"dtypes":4,"Dtype":5'))) == ["a"]


@pytest.mark.parametrize("second", ["a", "\\u0061"])
def test_a_tensor_name_that_occurs_twice_is_refused(second):
    text = f'{{"__metadata__":{{}},"a":{EMPTY},"b":{EMPTY},"{second}":{EMPTY}}}'
    error = refused(text)
    assert "occurs twice" in str(error)
    assert error.tensor == "a"
    assert error.offset == 8 + text.rindex(f'"{second}"')


@pytest.mark.parametrize("second", ["k", "\\u006b"])
def test_a_metadata_key_that_occurs_twice_is_refused(second):
    text = f'{{"__metadata__":{{"k":"1","l":"2","{second}":"3"}},"a":{EMPTY}}}'
    error = refused(text)
    assert "key of __metadata__ occurs twice" in str(error)
    assert error.offset == 8 + text.rindex(f'"{second}"')


@pytest.mark.parametrize("value", ["null", "1", "[]", '"x"', '{"k":1}', '{"k":null}', '{"k":{}}', '{"k":["v"]}'])
def test_metadata_must_be_an_object_of_strings(value):
    assert "__metadata__" in str(refused(f'{{"__metadata__":{value}}}'))


def test_metadata_may_not_occur_twice():
    assert "__metadata__ occurs twice" in str(refused('{"__metadata__":{},"\\u005f_metadata__":{}}'))


def test_metadata_may_hold_any_strings_and_stand_anywhere():
    metadata = '"__metadata__":{"":"","é":"\\ud83d\\ude00","dtype":"U8","long":"' + "x" * 70_000 + '","\\n":"\\u0000"}'
    for text in (f'{{{metadata},"a":{EMPTY}}}', f'{{"a":{EMPTY},{metadata}}}'):
        header = parsed(text)
        assert header.metadata == {"": "", "é": "😀", "dtype": "U8", "long": "x" * 70_000, "\n": "\0"}
        assert list(header) == ["a"]


def test_a_metadata_dict_is_the_callers_own():
    header = parsed('{"__metadata__":{"k":"v"}}')
    header.metadata.clear()
    assert header.metadata == {"k": "v"}


# --- rules 7 to 10: types, shapes, sizes, offsets


@pytest.mark.parametrize("dtype", ["u8", "U8 ", "", "F128", "BFLOAT16", "U80", "F8_E4M3FNU", "U8\\u0000"])
def test_a_dtype_outside_the_table_is_refused(dtype):
    error = refused(entry(dtype=dtype))
    assert "dtype" in str(error)
    assert error.tensor == "a"


@pytest.mark.parametrize("dtype", ["1", "null", '{"U8":null}', '["U8"]'])
def test_a_dtype_must_be_a_string(dtype):
    assert "dtype" in str(refused(entry().replace('"U8"', dtype)))


@pytest.mark.parametrize(
    "size",
    ["1.0", "1e0", "-0", "-1", "00", "01", "18446744073709551616", "1" + "0" * 40, '"0"', "null", "true", "[]", "0."],
)
def test_a_dimension_must_be_an_unsigned_64_bit_integer_written_as_one(size):
    assert "shape" in str(refused(entry(shape=f"[0,{size}]")))
    assert "data_offsets" in str(refused(entry(offsets=f"[0,{size}]")))


@pytest.mark.parametrize("shape", ["null", "0", '"0"', "{}", '{"0":0}', "true", "[0", "[,]", "[0,]", "[0 0]"])
def test_a_shape_must_be_an_array(shape):
    refused(entry(shape=shape))


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (127,), (128,), (2**63, 0), (0, 2**64 - 1), (0, *range(70)), (0,) * 5000]
)
def test_shapes_come_back_as_they_were_written(shape):
    nbytes = 0 if 0 in shape else int(np.prod(shape))
    header = parsed(entry(shape=str(list(shape)), offsets=f"[0,{nbytes}]"), nbytes)
    assert header["a"].shape == shape


@pytest.mark.parametrize(
    "shape", ["[4294967296,4294967296,0]", "[18446744073709551615,2,0]", "[3,6148914691236517206]"]
)
def test_a_product_that_overflows_on_its_way_is_refused(shape):
    assert "product of the shape overflows" in str(refused(entry(shape=shape)))


def test_a_product_is_zero_from_the_first_zero_on():
    assert parsed(entry(shape="[4294967296,0,4294967296,4294967296]"))["a"].nbytes == 0


@pytest.mark.parametrize(("dtype", "size"), [("U8", 2**61), ("F64", 2**58), ("F4", 2**62), ("F6_E2M3", 2**62)])
def test_a_number_of_bits_that_overflows_is_refused(dtype, size):
    assert "bits overflows" in str(refused(entry(dtype=dtype, shape=f"[{size}]")))


@pytest.mark.parametrize(("dtype", "size"), [("F4", 1), ("F4", 3), ("F6_E2M3", 1), ("F6_E3M2", 2), ("F6_E2M3", 6)])
def test_a_tensor_that_ends_within_a_byte_is_refused(dtype, size):
    assert "within a byte" in str(refused(entry(dtype=dtype, shape=f"[{size}]", offsets="[0,1]"), 1))


@pytest.mark.parametrize(("dtype", "size", "nbytes"), [("F4", 2, 1), ("F6_E2M3", 4, 3), ("F6_E3M2", 8, 6)])
def test_packed_elements_take_their_bits(dtype, size, nbytes):
    assert parsed(entry(dtype=dtype, shape=f"[{size}]", offsets=f"[0,{nbytes}]"), nbytes)["a"].nbytes == nbytes


@pytest.mark.parametrize("offsets", ["[0,5]", "[0,3]", "[0,0]"])
def test_offsets_must_span_what_dtype_and_shape_make(offsets):
    error = refused(entry(dtype="F32", shape="[]", offsets=offsets), 5)
    assert f"dtype and shape make 4 bytes, data_offsets {offsets[3]}" in str(error)


@pytest.mark.parametrize(
    "offsets", ["[0]", "[]", "[0,0,0]", "[0,0,]", "null", "0", '{"0":0}', '"00"', "[0 0]", "[0,0}"]
)
def test_offsets_must_be_a_pair(offsets):
    assert "data_offsets" in str(refused(entry(offsets=offsets)))


def test_offsets_may_not_run_backwards():
    assert "end before they begin" in str(refused(entry(offsets="[1,0]"), 1))


@pytest.mark.parametrize(
    ("spans", "nbytes"),
    [
        ([(1, 2)], 2), ([(0, 1), (2, 3)], 3), ([(0, 2), (1, 3)], 3), ([(0, 1), (0, 1)], 1), ([(0, 1), (1, 2), (0, 2)],
        2),
        ([(0, 1), (1, 1), (2, 2)], 1), ([(5, 5)], 0), ([(2**64 - 1, 2**64 - 1)], 0), ([(0, 2), (1, 1)], 2),
        ([(0, 1), (2**63, 2**63 + 1)], 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("turned", [False, True])
def test_holes_overlaps_and_aliases_are_refused(spans, nbytes, turned):
    members = [
        f'"t{i}":{{"dtype":"U8","shape":[{end - begin}],"data_offsets":[{begin},{end}]}}'
        for i, (begin, end) in enumerate(spans)
    ]
    text = "{" + ",".join(reversed(members) if turned else members) + "}"
    error = refused(text, nbytes)
    assert "must begin at" in str(error)
    assert error.offset == 8 + text.index(f'"{error.tensor}"')


@pytest.mark.parametrize("nbytes", [0, 2, 100])
def test_the_tensors_must_end_where_the_file_does(nbytes):
    assert f"the tensors take 1 bytes, and {nbytes} follow" in str(refused(f'{{"a":{GOOD}}}', nbytes))


def test_offsets_near_the_end_of_64_bits_do_not_wrap():
    wraps = entry(shape="[18446744073709551615]", offsets="[0,18446744073709551615]")
    refused(wraps)
    two = f'{{"a":{GOOD},"b":{{"dtype":"U8","shape":[0],"data_offsets":[18446744073709551615,0]}}}}'
    assert "end before they begin" in str(refused(two, 1))


def test_a_file_may_be_as_large_as_an_offset_can_say():
    size = 2**63 - 200
    octets = file_of(entry(shape=f"[1,{size // 8}]", offsets=f"[0,{size // 8}]"))
    assert parse_header(octets, len(octets) + size // 8)["a"].stop == len(octets) + size // 8


def test_max_tensors_refuses_more_as_soon_as_they_are_met():
    text = f'{{"__metadata__":{{}},"a":{EMPTY},"b":{EMPTY}}}'
    assert len(parsed(text, max_tensors=2)) == 2
    assert "limit of 1" in str(refused(text, max_tensors=1))
    assert "limit of 1" in str(refused(text[:-1] + ',"c":this is never read', max_tensors=1))


def test_an_error_shortens_a_long_name():
    error = refused(f'{{"{"x" * 10_000}":1}}')
    assert len(str(error)) < 500
    assert error.tensor == "x" * 10_000


# --- memory

MEASURE = """
import sys
from asyncshard.format.header import parse_header

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

count, order = int(sys.argv[1]), sys.argv[2]
parse_header(b"\\x02" + bytes(7) + b"{}")
places = range(count) if order == "sorted" else [(i * 7919) % count for i in range(count)]
name = "n{}" if order == "sorted" else "blk.{}.w"
with open(sys.argv[3], "w+b") as file:  # written in pieces, so that making it leaves no peak
    file.write(bytes(8) + b"{")
    for first in range(0, count, 1000):
        file.write(b"," * (first > 0) + ",".join(
            f'"{name.format(i)}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}'
            for i in places[first:first + 1000]
        ).encode())
    file.write(b"}")
    size = file.tell()
    file.seek(0)
    file.write((size - 8).to_bytes(8, "little"))
    before = resident("VmRSS:")
    file.seek(0)
    header = parse_header(file.read(), size + count)
assert len(header) == count
print(size, resident("VmHWM:") - before, header.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitiser keeps freed memory")
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
def test_a_million_tensors_take_at_most_two_and_a_half_times_the_headers_bytes(order, tmp_path):
    arguments = [sys.executable, "-c", MEASURE, "1000000", order, str(tmp_path / "header")]
    result = subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=100)
    size, peak, held = map(int, result.stdout.split())
    assert peak <= 2.5 * size
    assert held <= size


# --- names in several headers


def test_names_in_two_headers_are_found_with_both_places():
    tables = [
        parsed("{" + ",".join(f'"{name}":{EMPTY}' for name in names) + "}").table for names in ("abc", "de", "eca")
    ]
    assert sorted(duplicate_names(tables, limit=20)) == [("a", 0, 2), ("c", 0, 2), ("e", 1, 2)]
    assert len(duplicate_names(tables, limit=2)) == 2
    assert duplicate_names(tables, limit=0) == []
    assert duplicate_names(tables[:2], limit=20) == []
    assert duplicate_names([], limit=20) == []


def test_many_names_in_many_headers_are_told_apart():
    tables = []
    for t in range(30):
        names = [f"t{t}.{i}" for i in range(300)] + ["shared"] * (t in (3, 21))
        tables.append(parsed("{" + ",".join(f'"{name}":{EMPTY}' for name in names) + "}").table)
    assert duplicate_names(tables, limit=20) == [("shared", 3, 21)]


def test_only_headers_can_be_compared():
    with pytest.raises(TypeError):
        duplicate_names([object()], limit=20)
    with pytest.raises(ValueError):
        duplicate_names([], limit=-1)
