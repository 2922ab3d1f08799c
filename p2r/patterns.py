r"""Regular expressions of users, in Python's syntax, matched in linear time.

Python's engine backtracks: `^((a+)+)$` takes 2**n steps on n letters, holds the interpreter's lock meanwhile, and cannot be
stopped. RE2 takes time in proportion to the text for every expression, and bounded memory to compile one. A time limit
would need no translation, but its outcome would depend on the machine, and compiling would stay unbounded.

An expression is checked by Python's parser, then rewritten where RE2 reads the same text in another way: `\w`, `\d` and
`\s` mean Unicode's letters, digits and spaces, as they do in Python; `$` is the very end, also after a line break. RE2 has
no look-around, no back-references, no atomic or possessive groups, no conditions, and no repetition above 1,000: these are
refused by name.

Source: Cox 2010, "Regular Expression Matching in the Wild"; github.com/google/re2/wiki/Syntax.
"""

import re
import warnings
from functools import lru_cache

import re2

from p2r.documents import as_utf8

MAX_LENGTH = 1000
"""Longest expression, characters."""

_MAX_MEMORY = 1 << 22  # bytes of a compiled expression
_WORD, _DIGIT = r"\p{L}\p{N}_", r"\p{Nd}"
_SPACE = r"\t-\r\x1c-\x20\x{85}\p{Z}"
_OUTSIDE = {
    "w": f"[{_WORD}]", "W": f"[^{_WORD}]", "d": _DIGIT, "D": r"\P{Nd}", "s": f"[{_SPACE}]", "S": f"[^{_SPACE}]", "Z": r"\z",
}  # fmt: skip
_INSIDE = {"w": _WORD, "d": _DIGIT, "D": r"\P{Nd}", "s": _SPACE, "b": r"\x08"}
_CODE_LENGTH = {"x": 2, "u": 4, "U": 8}
_SYNTAX = (
    "RE2 has no look-around, back-references, atomic or possessive groups, conditions, flags but i, m and s, nor "
    "repetitions above 1,000 in all"
)


class Pattern:
    """A user's regular expression.

    Args:
        text: The expression, in Python's syntax.

    Raises:
        ValueError: It is none, or has what RE2 has not; says what.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise ValueError(f"is longer than {MAX_LENGTH:,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # what Python will read in another way one day is not clear today
                flags = re.compile(text).flags
        except (re.error, RecursionError, OverflowError, Warning, ValueError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        if flags & (re.VERBOSE | re.ASCII | re.LOCALE):
            raise ValueError(f"is not a regular expression that p2r reads: {_SYNTAX}")
        try:
            self._compiled = re2.compile(_translated(text), options=_options())
        except re2.error as error:
            why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise ValueError(f"is not a regular expression that p2r reads: {why}; {_SYNTAX}") from None
        self.num_groups = int(self._compiled.groups)

    def first_group(self, text: str) -> str | None:
        """Search a text, and return what the first group holds; None if nothing matches, or the group takes no part."""
        match = self._compiled.search(as_utf8(text))
        return None if match is None else match[1]


@lru_cache(maxsize=64)
def subject_pattern(text: str) -> Pattern:
    """Return the expression that finds a subject in a name: its first group.

    Raises:
        ValueError: It is none, or has no group.
    """
    pattern = Pattern(text)
    if pattern.num_groups < 1:
        raise ValueError(f"needs a group around the subject, got {text!r}")
    return pattern


def check_subject_pattern(text: str) -> str:
    """Return `text` as it is, for models: `subject_pattern` without its result."""
    subject_pattern(text)
    return text


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.log_errors = False
    return options


def _translated(text: str) -> str:
    """Rewrite Python's syntax, which `re` has accepted, as RE2's."""
    pieces = []
    position, is_inside = 0, False  # of brackets
    while position < len(text):
        piece = length = None
        if text[position] == "\\":
            piece, length = _escape(text[position:], is_inside)
        elif is_inside and text[position] == "[":
            piece, length = r"\[", 1  # RE2 would take `[:alpha:]` for a class
        elif is_inside:
            is_inside = text[position] != "]"
        elif match := re.match(r"\[(\^?)(\]?)", text[position:]):
            is_inside = True
            piece, length = f"[{match[1]}" + (r"\]" if match[2] else ""), len(match[0])
        elif match := re.match(r"\{,(\d+)\}", text[position:]):
            piece, length = f"{{0,{match[1]}}}", len(match[0])
        length = length or 1
        pieces.append(text[position : position + length] if piece is None else piece)
        position += length
    return "".join(pieces)


def _escape(text: str, is_inside: bool) -> tuple[str, int]:
    """Return RE2's words for the escape that a text begins with, and its length in Python's."""
    letter = text[1]
    if letter in _CODE_LENGTH:
        length = 2 + _CODE_LENGTH[letter]
        return f"\\x{{{text[2:length]}}}", length
    if letter in ("W", "S") and is_inside:
        raise ValueError(f"has \\{letter} in brackets, which p2r does not read: write what is meant, or use it outside")
    if letter in ("b", "B") and not is_inside:
        raise ValueError(f"has \\{letter}, which p2r does not read: write the characters that may stand there")
    if letter in "0N" or (is_inside and letter.isdigit()):
        raise ValueError(f"has \\{letter}, which p2r does not read: write the character itself, or \\xHH")
    return (_INSIDE if is_inside else _OUTSIDE).get(letter, text[:2]), 2
