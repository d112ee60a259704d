"""The index of a checkpoint: its JSON, its files' confinement, and its agreement with the headers."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncshard._core import WeightMap
from asyncshard.errors import FormatError
from asyncshard.format.header import parse_header
from asyncshard.format.index import parse_index


def parsed(text, **options) -> WeightMap:
    return parse_index(text if isinstance(text, bytes) else text.encode(), path="index.json", **options)


def mapped(weight_map, **options) -> WeightMap:
    return parsed(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}), **options)


def refused(text, **options) -> FormatError:
    with pytest.raises(FormatError) as caught:
        parsed(text, **options)
    assert str(caught.value).startswith("index.json: ")
    assert caught.value.path == "index.json"
    return caught.value


def table_of(*names):
    entries = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in names}
    text = json.dumps(entries).encode()
    return parse_header(len(text).to_bytes(8, "little") + text).table


def test_each_name_leads_to_its_file():
    index = mapped({"a": "1.safetensors", "b": "2.safetensors", "é😀": "1.safetensors", "": "sub/3.safetensors"})
    assert len(index) == 4
    assert index.files == ("1.safetensors", "2.safetensors", "sub/3.safetensors")
    assert [index.find(name) for name in ("a", "b", "é😀", "", "c", "\ud800")] == [0, 1, 0, 2, -1, -1]
    assert [index.first_name(i) for i in range(3)] == ["a", "b", ""]
    for file_index in (-1, 3):
        with pytest.raises(IndexError):
            index.first_name(file_index)
        with pytest.raises(IndexError):
            index.compare(file_index, table_of(), limit=20)


def test_an_index_may_map_nothing():
    index = parsed('{"weight_map":{}}')
    assert (len(index), index.files, index.find("a")) == (0, (), -1)


def test_names_are_the_same_however_they_are_spelled():
    index = parsed('{"\\u0077eight_map":{"\\u0061\\n":"f\\u002e1"}}')
    assert index.files == ("f.1",)
    assert index.find("a\n") == 0


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.sampled_from("fghi")),
    st.booleans(),
)
def test_any_map_reads_as_python_reads_it(weight_map, ascii_only):
    index = parsed(json.dumps({"weight_map": weight_map}, ensure_ascii=ascii_only))
    assert len(index) == len(weight_map)
    assert index.files == tuple(dict.fromkeys(weight_map.values()))
    assert all(index.files[index.find(name)] == file for name, file in weight_map.items())


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"weight_map"', '{"weight_map":{}', '{"weight_map":{},}', '{"weight_map":{}} x',
        "{'weight_map':{}}",
        '{"weight_map":{"a":"f",}}', '{"weight_map":{"a" "f"}}', '{"weight_map":{},"x":NaN}',
        '{"weight_map":{},"x":01}',
        '{"x":1e999,"weight_map":{}}', '{"x":"\\ud800","weight_map":{}}', '{"weight_map":{"a":"\\udc00"}}',
        '{"weight_map":{},"x":' + "[" * 127 + "]" * 127 + "}", b'{"weight_map":{"\xc3":"f"}}',
        b'{"weight_map":{"a":"\xff"}}',
    ],
)  # fmt: skip
def test_a_text_that_is_not_strict_json_is_refused(text):
    assert refused(text).offset is not None


def test_127_levels_of_other_fields_are_read():
    assert len(parsed('{"x":' + "[" * 126 + "]" * 126 + ',"weight_map":{}}')) == 0


@pytest.mark.parametrize("text", ["{}", '{"metadata":{"weight_map":{}}}', '{"Weight_map":{}}'])
def test_a_missing_weight_map_is_an_error(text):
    assert "there is no weight_map" in str(refused(text))


@pytest.mark.parametrize("value", ["null", "[]", '"f"', "1", '[["a","f"]]'])
def test_a_weight_map_must_be_an_object(value):
    assert "weight_map is not an object" in str(refused(f'{{"weight_map":{value}}}'))


@pytest.mark.parametrize("value", ["null", "1", "[]", '["f"]', "{}", "true"])
def test_a_file_must_be_a_string(value):
    error = refused(f'{{"weight_map":{{"a":"f","b":{value}}}}}')
    assert "tensor 'b'" in str(error)
    assert (error.tensor, error.offset) == ("b", 27)


def test_a_weight_map_may_not_occur_twice():
    assert "weight_map occurs twice" in str(refused('{"weight_map":{},"weight_ma\\u0070":{}}'))


@pytest.mark.parametrize("second", ["a", "\\u0061"])
@pytest.mark.parametrize("file", ["f", "g"])
def test_a_name_may_not_occur_twice(second, file):
    text = f'{{"weight_map":{{"a":"f","b":"f","{second}":"{file}"}}}}'
    error = refused(text)
    assert "'a': the tensor name occurs twice in weight_map" in str(error)
    assert error.offset == text.rindex(f'"{second}"')


def test_max_entries_refuses_more():
    assert len(mapped({"a": "f", "b": "f"}, max_entries=2)) == 2
    assert "limit of 1" in str(refused('{"weight_map":{"a":"f","b":"f"}}', max_entries=1))


def test_a_text_cut_at_any_byte_is_refused():
    text = '{"metadata":{"n":[1,true,"é"]},"weight_map":{"é\\n":"f","b":"\\u0067"}}'.encode()
    assert parsed(text).files == ("f", "g")
    for size in range(len(text)):
        refused(text[:size])


@pytest.mark.parametrize(
    "file",
    [
        "", "/etc/passwd", "/", "..", "../x", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "//a", "\\\\host\\a",
        "a\\b", "..\\a", "C:a", "c:/a", "C:\\a", "a\0b", "\0",
    ],
)  # fmt: skip
def test_a_file_outside_the_directory_is_refused(file):
    error = refused(json.dumps({"weight_map": {"good": "1.safetensors", "bad": file, "worse": file}}))
    assert error.tensor == "bad"
    assert "'bad'" in str(error)
    assert repr(file) in str(error)


@pytest.mark.parametrize(
    "file", ["a", "a.safetensors", "a/b.safetensors", "...", "..a", "a..b", "~", "%2e%2e", "é", "ab:c", "a b"]
)
def test_a_file_inside_the_directory_is_taken(file):
    assert mapped({"a": file}).files == (file,)


def test_a_map_and_a_header_are_compared_both_ways():
    index = mapped({"a": "1", "b": "1", "c": "2", "d": "1"})
    assert index.compare(0, table_of("a", "b", "d"), limit=20) == ([], [])
    assert index.compare(0, table_of("a", "c", "x"), limit=20) == (["b", "d"], ["c", "x"])
    assert index.compare(1, table_of(), limit=20) == (["c"], [])
    assert index.compare(0, table_of("c", "x"), limit=1) == (["a"], ["c"])
    assert index.compare(0, table_of("c", "x"), limit=0) == ([], [])
    with pytest.raises(ValueError):
        index.compare(0, table_of(), limit=-1)
    with pytest.raises(TypeError):
        index.compare(0, None, limit=20)


def test_a_large_map_is_compared_file_by_file():
    names = [f"model.layers.{i // 9}.w{i % 9}" for i in range(20_000)]
    index = mapped({name: f"model-{i // 1000:05}-of-00020.safetensors" for i, name in enumerate(names)})
    assert len(index.files) == 20
    for file in range(20):
        assert index.compare(file, table_of(*names[file * 1000 : file * 1000 + 1000]), limit=20) == ([], [])
    assert index.compare(3, table_of(*names[:1000]), limit=5) == (names[3000:3005], names[:5])


def test_a_weight_map_cannot_be_made_by_hand():
    with pytest.raises(TypeError):
        WeightMap()
