"""Documents from outside are bounded in size, depth and numbers."""

import contextlib
import json
import tracemalloc
from itertools import pairwise
from typing import Annotated

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, TypeAdapter

from p2r import documents
from p2r.documents import Details, Digests, FewKeys, checked, memory_of, read_json, read_lines
from p2r.errors import DataError
from p2r.plain_yaml import read_yaml

REFUSED = {
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "empty": (b"", "not JSON"),
    "cut off": (b'{"a": 1', "not JSON"),
    "too large": (b" " * 2000 + b"1", "more than the 1,000 bytes"),
    "four hundred lists": (b"[" * 400 + b"]" * 400, "may be 8 deep"),
    "nine lists": (b"[" * 9 + b"]" * 9, "may be 8 deep"),
    "nine objects": (b'{"a":' * 9 + b"1" + b"}" * 9, "may be 8 deep"),
    "a key twice": (b'{"b": {"a": 1, "a": 2}}', "key 'a' is twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a number"),
    "infinity": (b'{"a": -Infinity}', "-Infinity is not a number"),
    "1e999": (b'{"a": 1e999}', "1e999 is too large"),
    "an integer of 65 bits": (b"18446744073709551616", "not a whole number of 64 bits"),
    "an integer of 900 digits": (b"9" * 900, "not a whole number of 64 bits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_leaves_a_bound_is_refused_by_name(case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as refusal:
        read_json(content, where="a manifest", max_bytes=1000, max_depth=8, error=DataError)
    assert str(refusal.value).startswith("a manifest ")


def test_depth_beyond_python_s_own_limit_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="may be 32 deep"):
        read_json(b"[" * 10**6, where="a manifest", max_bytes=10**7, error=DataError)


def test_what_keeps_within_the_bounds_is_read_as_python_reads_it() -> None:
    content = b'{"a": [1, -2.5e3, true, null, "\\u00e9"], "b": {"c": 9223372036854775807}}'
    assert read_json(content, where="", max_bytes=1000) == json.loads(content)
    assert read_json(b"[" * 8 + b"]" * 8, where="", max_bytes=1000, max_depth=8) == json.loads(b"[" * 8 + b"]" * 8)
    assert read_json(b"[" * 8 + b"1" + b"]" * 8, where="", max_bytes=1000, max_depth=8)


def test_a_key_that_stands_twice_is_named_with_both_lines() -> None:
    content = b'{"x": {"b": "{\\"a\\": [", "c": 1},\n "a": [\n1],\n"\\u0061": 2}'
    with pytest.raises(DataError, match="key 'a' is twice in one object, on lines 2 and 4"):
        read_json(content, where="a manifest", max_bytes=1000, error=DataError)


@pytest.mark.parametrize("text", ['"\\ud800"', '{"\\udfff": 1}', '["\\u0000"]'])
def test_a_text_that_no_file_can_hold_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"surrogate pair|character 0"):
        read_json(text.encode(), where="a manifest", max_bytes=1000, error=DataError)
    with pytest.raises(DataError):
        read_yaml(text, where="a job", error=DataError)


def test_a_mark_of_the_byte_order_and_escaped_escapes_are_read() -> None:
    assert read_json(b'\xef\xbb\xbf["\\\\ud800", "\\ud83d\\ude00"]', where="", max_bytes=100) == ["\\ud800", "😀"]


def test_a_document_of_many_small_values_is_refused_before_it_is_parsed() -> None:
    content = b"[" + b"[]," * 499 + b"[],1]"
    with pytest.raises(DataError, match="a list would take about 0 MiB of memory, more than"):
        read_json(content, where="a list", max_bytes=10_000, max_memory_bytes=2**16, error=DataError)
    with pytest.raises(DataError, match="up to line 8 would take"):
        list(read_lines(b"[[],[]]\n" * 9, where="rows", max_bytes=100, max_memory_bytes=3000, error=DataError))
    assert read_json(content, where="", max_bytes=10_000, max_memory_bytes=2**20)


DEAR = {
    "digests": b"[" + b",".join(b'"%064x"' % number for number in range(500)) + b"]",
    "small objects": b"[" + b'{"a":0},' * 5000 + b"0]",
    "objects with a blank": b"[" + b'{"a" :0},' * 5000 + b"0]",
    "empty objects": b"[" + b"{}," * 10_000 + b"0]",
    "empty lists": b"[" + b"[]," * 10_000 + b"0]",
    "lists in lists": b"[" + b"[[[[[]]]]]," * 4000 + b"0]",
    "digits": b"[" + b"9," * 20_000 + b"0]",
    "long integers": b"[" + b"4611686018427387904," * 2000 + b"0]",
    "fractions": b"[" + b"1.5," * 10_000 + b"0]",
    "short texts": b"[" + b'"ab",' * 8000 + b"0]",
    "signs": b"[" + '"😀",'.encode() * 6000 + b"0]",
    "a long text with a sign": b'["' + "😀".encode() + b"a" * 40_000 + b'"]',
    "keys": b"{" + b",".join(b'"%x":0' % number for number in range(4000)) + b"}",
    "keys of many objects": b"["
    + b",".join(b'{"%x":0,"b%x":0,"c%x":0,"d%x":0,"e%x":0,"f%x":0}' % ((number,) * 6) for number in range(500))
    + b"]",
}


@pytest.mark.parametrize("least_bytes", [1 << 30, 1 << 10], ids=["by Python's reader", "by the fast reader"])
@pytest.mark.parametrize("case", DEAR)
def test_no_document_takes_more_memory_than_is_estimated(
    case: str, least_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MANY_BYTES", least_bytes)
    content = DEAR[case]
    tracemalloc.start()
    try:
        value = read_json(content, where="", max_bytes=len(content))
        peak = tracemalloc.get_traced_memory()[1] + len(content)
    finally:
        tracemalloc.stop()
    assert value and peak < memory_of(content) + 16_384 < 10 * peak


class _Many(BaseModel):
    model_config = ConfigDict(strict=True)
    digests: Digests = []
    counts: Annotated[dict[str, int], FewKeys] = {}
    details: Details = {}


@pytest.mark.parametrize(
    "value",
    [
        {"digests": ["x"] * 200_000},
        {"counts": dict.fromkeys(map(str, range(200_000)), "x")},
        {"details": {"a": list(range(200_000))}},
        {"details": {"a": "x" * 2_000_000}},
        {"digests": "x" * 2_000_000},
    ],
    ids=["digests", "keys", "values", "letters", "a text"],
)
def test_a_refusal_of_many_wrong_values_costs_no_memory(value: dict[str, object]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a manifest (digests|counts|details)") as refusal:
            checked(TypeAdapter(_Many), value, where="a manifest", error=DataError)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000 and len(str(refusal.value)) < 300


def test_lines_are_values_with_their_numbers() -> None:
    assert list(read_lines(b'{"a": 1}\r\n\n[2]\n', where="rows", max_bytes=100)) == [(1, {"a": 1}), (3, [2])]
    for content in (b'1\n{"a": 1, "a": 2}\n', b"1\n" + b"9" * 40, b"1\n\xff", b"1\nNaN"):
        with pytest.raises(DataError, match="rows, line 2 is not JSON"):
            list(read_lines(content, where="rows", max_bytes=100, error=DataError))
    with pytest.raises(DataError, match="rows has more than the 4 bytes"):
        list(read_lines(b"1\n2\n3", where="rows", max_bytes=4, error=DataError))
    with pytest.raises(DataError, match="line 2 has more than the 8 bytes"):
        list(read_lines(b"1\n123456789", where="rows", max_bytes=40, max_line_bytes=8, error=DataError))


YAML_REFUSED = {
    "a key twice": ("a: 1\nb: {c: 2}\na: 3", "line 3: key 'a' is twice in one mapping, first on line 1"),
    "a key twice, once quoted": ("b: {c: 2,\n  'c': 3}", "line 2: key 'c' is twice in one mapping, first on line 1"),
    "laughs": ("a: &a [1]\n" + "".join(f"{c}: &{c} [{f'*{b},' * 9}]\n" for b, c in pairwise("abcdefgh")), "100,000 values"),
    "an alias in itself": ("a: &a\n  - *a", "line 2: the alias \\*a names nothing that is complete"),
    "no anchor": ("a: *a", "alias"),
    "depth": ("[" * 33 + "]" * 33, "line 1: mappings and lists may be 32 deep"),
    "depth without end": ("[" * 900_000, "line 1: mappings and lists may be 32 deep"),
    "depth by aliases": ("\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 33))]), "line 32: .*32 deep"),
    "many values": ("a: [" + "1," * 100_000 + "]", "more than 100,000 values"),
    "a long text a thousand times": ('a: &a "' + "z" * 10_000 + '"\nb: [' + "*a," * 1000 + "]", "4,194,304 characters"),
    "a list of long texts, by aliases": ('a: &a ["' + "z" * 10_000 + '"]\nb: [' + "*a," * 1000 + "]", "4,194,304 characters"),
    "many bytes": ("#" * 1_048_577, "more than the 1,048,576 bytes"),
    "a large integer": ("a: " + "9" * 40, "line 1: 9+ is not a whole number of 64 bits"),
    "an integer of 5,000 digits": ("a: " + "9" * 5000, "line 1: '9+' is not a valid int"),
    "not a number": ("a: .nan", "line 1: .nan is not a finite number"),
    "infinity": ("a: 1.e+400", "is not a finite number"),
    "a number to base 8": ("b: 1\na: 0777", "line 2: 0777 is another number .* the text in quotes: '0777'"),
    "a negative number to base 8": ("a: [-07]", "line 1: -07 is another number"),
    "a subject's number": ("subjects: [001, 002]", "line 1: 001 is another number"),
    "a number that is said to be one": ("a: !!int '010'", "line 1: 010 is another number"),
    "hours": ("a: 1:30:00", "line 1: 1:30:00 is another number .* a colon base 60"),
    "minutes with a fraction": ("a: 190:20:30.15", "line 1: 190:20:30.15 is another number"),
    "a key to base 8": ("010: x", "line 1: 010 is another number"),
    "a key over two lines": ("{a\n b: 1}", "line 1: a key spans several lines: write it on one line"),
    "a quoted key over two lines": ("{'a\n b': 1}", "line 1: a key spans several lines"),
    "a key that is asked for over two lines": ("? a\n  b\n: 1", "line 1: a key spans several lines"),
    "a block as a key": ("? |\n  a\n: 1", "line 1: a key spans several lines"),
    "an object": ("a: !!python/object:os.system x", "the tag .*python/object:os.system is not read"),
    "a set": ("a: !!set {b}", "the tag .*set is not read"),
    "no boolean": ("a: !!bool perhaps", "'perhaps' is not a valid bool"),
    "a key that is a list": ("? [1]\n: 2", "a key is a list or a mapping"),
    "two documents": ("a\n---\nb", "line 2: a second document begins"),
    "no YAML": ("a: [", "not YAML"),
    "a control character": ("a: \x01", "not YAML"),
    "a merge of a number": ("<<: 3", "`<<` merges a mapping"),
}  # fmt: skip


@pytest.mark.parametrize("case", YAML_REFUSED)
def test_yaml_that_leaves_a_bound_is_refused_by_name(case: str) -> None:
    text, message = YAML_REFUSED[case]
    with pytest.raises(DataError, match=message) as refusal:
        read_yaml(text.encode(), where="a job", error=DataError)
    assert str(refusal.value).startswith("a job")


def test_yaml_is_read_as_pyyaml_reads_it_but_for_dates() -> None:
    text = """
    a: &a {b: 1, c: [x, ~, true, 0x10, 1_000, 1.5e+3, "1", 'y: z']}
    d: {<<: *a, b: 2}
    e: [*a, *a]
    f: {<<: [{b: 3}, *a], g: two}
    1: {no: -2}
    """
    value = read_yaml(text, where="")
    assert value == yaml.safe_load(text)
    value["e"][0]["b"] = 9  # what an alias named is a copy
    assert (value["a"]["b"], value["e"][1]["b"], value["d"]["b"]) == (1, 1, 2)
    assert read_yaml("a: 2026-11-29", where="") == {"a": "2026-11-29"}
    assert read_yaml("# nothing", where="") is None
    assert read_yaml("[0, -0, 0.5, 00.5, 0x1F, 0b11, '0777', '1:30', 1:x, 008]", where="") == (
        [0, 0, 0.5, 0.5, 31, 3, "0777", "1:30", "1:x", "008"]
    )


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_no_damage_to_a_document_ends_in_another_error(data: st.DataObject) -> None:
    json_text = b'{"a": [1, -2.5e3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {"c": 9223372036854775807}}'
    yaml_text = b"a: &a {b: 1, c: [x, ~, 0x10, 2026-11-29, 1.5e+3]}\nd: {<<: *a, b: !!str 2}\ne: [*a, *a]\n"
    pieces = [
        b"&a",
        b"*a",
        b"<<",
        b"{",
        b"[",
        b"\xff",
        b"\\u0000",
        b"\n",
        b": ",
        b"1e999",
        b"9" * 30,
        b"!!bool",
        b"---\n",
    ]
    content = bytearray(data.draw(st.sampled_from([json_text, yaml_text])))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content)))
        piece = data.draw(st.sampled_from(pieces) | st.binary(max_size=3))
        content[place : place + data.draw(st.integers(0, 4))] = piece
    with contextlib.suppress(DataError):
        read_json(bytes(content), where="d", max_bytes=1000, error=DataError)
    with contextlib.suppress(DataError):
        read_yaml(bytes(content), where="d", error=DataError)
    with contextlib.suppress(DataError):
        read_yaml(bytes(content).decode(errors="surrogateescape"), where="an argument of a command", error=DataError)
    with contextlib.suppress(DataError):
        list(read_lines(bytes(content), where="d", max_bytes=1000, error=DataError))
