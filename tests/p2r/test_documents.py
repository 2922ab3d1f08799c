"""JSON from outside is bounded in size, depth and numbers."""

import json

import pytest

from p2r.documents import read_json
from p2r.errors import DataError

REFUSED = {
    "not UTF-8": (b"\xff\xfe", "not JSON"),
    "empty": (b"", "not JSON"),
    "cut off": (b'{"a": 1', "not JSON"),
    "too large": (b" " * 2000 + b"1", "2,001 bytes, more than the 1,000"),
    "four hundred lists": (b"[" * 400 + b"]" * 400, "may be 8 deep"),
    "nine lists": (b"[" * 9 + b"]" * 9, "may be 8 deep"),
    "nine objects": (b'{"a":' * 9 + b"1" + b"}" * 9, "may be 8 deep"),
    "a key twice": (b'{"b": {"a": 1, "a": 2}}', "key 'a' stands twice"),
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
