"""Users' regular expressions find what Python's find, and never hang."""

import contextlib
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2r.patterns import Pattern, check_subject_pattern, subject_pattern

PATTERNS = [
    r"^(sub-[A-Za-z0-9]+|[^_.]+)", r"^(.+?)\.nii", r"^(P\d+)/", r"^(hippocampus_\d+)", r"(\w+)$", r"(\W+)", r"([\w-]+)_", r"(\S+)\s",
    r"([^\d]+)", r"(?P<subject>a{,3}b)", r"([a[]+)", r"([]a]+)", r"([^]a]+)", r"(?i)(SUB)", r"\A(x)\Z", r"([\u00e4-\u00fc]+)",
    r"(\x41)", r"(a|ab)(c|bcd)?", r"(a*?)b", r"([a\]\-b]+)", r"(\D{2,3})", r"(?s:(.))", r"([\s])", r"(\.)", r"({)", r"(a{x})",
]  # fmt: skip


@pytest.mark.parametrize("text", ["^((a+)+)$", r"^(([a-z]+)*)*\d$", "(x+x+)+y", "^(.*a){20}$", "(a|a)*b"])
def test_no_expression_takes_longer_than_its_text(text: str) -> None:
    assert Pattern(text).first_group("a" * 100_000 + "!") is None or text == "^(.*a){20}$"


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize(
    "name",
    ["sub-01_T1w.nii.gz", "P12/x y.nii", "müller_1", "٣٤_ä\x1cö", "aabbcd", "[]a-b", "Sub {a{x}", "x", "A b\t", ""],
)
def test_a_name_gives_what_pythons_engine_gives(text: str, name: str) -> None:
    match = re.search(text, name)
    assert Pattern(text).first_group(name) == (match and match[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("(", "is not a regular expression: missing"),
        (r"(?=(a))", r"RE2 has no look-around"),
        (r"(a)\1", "back-references"),
        (r"(?P<x>a)(?P=x)", "back-references"),
        (r"((?>a))", "atomic"),
        (r"(a++)", "possessive"),
        (r"(a)?(?(1)b|c)", "conditions"),
        (r"(?x)( a )", "flags but i, m and s"),
        (r"(?a)(\w)", "flags but i, m and s"),
        (r"((?a:\w))", "flags but i, m and s"),
        (r"(a{2000})", "repetitions above 1,000"),
        ("(" + "(?:" * 90 + "a" + "){900}" * 90 + ")", "repetitions above 1,000"),
        (r"([\W_]+)", r"has \\W in brackets"),
        (r"(\bsub)", r"has \\b"),
        (r"([\N{LATIN SMALL LETTER A}])", r"has \\N"),
        ("(" * 600 + ")" * 600, "is longer than 1,000 characters"),
        (r"([[:alpha:]])", "is not a regular expression: .*nested set"),
        ("a", "needs a group around the subject"),
    ],
)
def test_what_is_not_read_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_subject_pattern(text)


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    pieces=st.lists(st.sampled_from(["a", "b", r"\w", r"\d", r"[\w-]", "[^a]", ".", "ä", "(", ")", "|", "*", "+", "?", "{,2}", "\\", "["])),
    name=st.text("ab1-ä_ ٣", max_size=8),
)  # fmt: skip
def test_any_expression_is_refused_or_gives_what_pythons_engine_gives(pieces: list[str], name: str) -> None:
    text = f"({''.join(pieces)})"
    with contextlib.suppress(ValueError):
        pattern = subject_pattern(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            match = re.search(text, name)
        assert pattern.first_group(name) == (match and match[1]), text
