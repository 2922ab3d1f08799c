r"""Users' regular expressions, in Python's syntax, matched in linear time.

Python's engine backtracks: `^((a+)+)$` takes 2**n steps on n letters, holds the interpreter's lock, and cannot be stopped.
RE2 matches every expression in linear time, and compiles it in bounded memory. A time limit would need no translation, but
its outcome would depend on the machine, and compilation would stay unbounded.

Python's parser checks an expression; then it is rewritten where RE2 reads the same text differently. `\w`, `\d` and `\s`
mean Unicode's letters, digits and spaces, as in Python; `$` matches only at the very end, after a final line break. RE2 has
no look-around, back-references, atomic or possessive groups, conditions, or repetitions above 1,000. These are refused by
name.

Source: Cox 2010, "Regular Expression Matching in the Wild"; github.com/google/re2/wiki/Syntax.
"""

import re
import warnings
from functools import lru_cache

import re2

from p2r.documents import as_utf8

MAX_LENGTH = 1000
"""Longest expression, characters."""

_MAX_MEMORY = 1 << 22  # limit of a compiled expression, bytes
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
        ValueError: The text is not a regular expression, or uses a feature that RE2 lacks; the message names it.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        if len(text) > MAX_LENGTH:
            raise ValueError(f"is longer than {MAX_LENGTH:,} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # refuse syntax that Python plans to read differently
                flags = re.compile(text).flags
        except (re.error, RecursionError, OverflowError, Warning, ValueError) as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        if flags & (re.VERBOSE | re.ASCII | re.LOCALE):
            raise ValueError(f"is not a regular expression that p2r reads: {_SYNTAX}")
        try:
            self._compiled = re2.compile(_translate_to_re2(text), options=_options())
        except re2.error as error:
            why = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error
            raise ValueError(f"is not a regular expression that p2r reads: {why}; {_SYNTAX}") from None
        self.num_groups = int(self._compiled.groups)

    def first_group(self, text: str) -> str | None:
        """Search a text and return the first group; None if nothing matches or the group is not part of the match."""
        match = self._compiled.search(as_utf8(text))
        return None if match is None else match[1]


@lru_cache(maxsize=64)
def subject_pattern(text: str) -> Pattern:
    """Return the compiled expression whose first group is the subject in a name.

    Raises:
        ValueError: The text is not a regular expression, or has no group.
    """
    pattern = Pattern(text)
    if pattern.num_groups < 1:
        raise ValueError(f"needs a group around the subject, got {text!r}")
    return pattern


def check_subject_pattern(text: str) -> str:
    """Validate a subject pattern and return it unchanged, for use in models."""
    subject_pattern(text)
    return text


def _options() -> re2.Options:
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.log_errors = False
    return options


def _translate_to_re2(text: str) -> str:
    """Rewrite an expression from Python's syntax, already accepted by `re`, to RE2's."""
    pieces = []
    position, is_inside = 0, False  # of brackets
    while position < len(text):
        piece = length = None
        if text[position] == "\\":
            piece, length = _translate_escape(text[position:], is_inside)
        elif is_inside and text[position] == "[":
            piece, length = r"\[", 1  # RE2 would read `[:alpha:]` as a class
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


def _translate_escape(text: str, is_inside: bool) -> tuple[str, int]:
    """Translate the escape at the start of a text to RE2, and return it with its length in Python's syntax."""
    letter = text[1]
    if letter in _CODE_LENGTH:
        length = 2 + _CODE_LENGTH[letter]
        return f"\\x{{{text[2:length]}}}", length
    if letter in ("W", "S") and is_inside:
        raise ValueError(
            f"has \\{letter} in brackets, which p2r does not support: list the characters, or use it outside"
        )
    if letter in ("b", "B") and not is_inside:
        raise ValueError(f"has \\{letter}, which p2r does not support: write the characters that may be there")
    if letter in "0N" or (is_inside and letter.isdigit()):
        raise ValueError(f"has \\{letter}, which p2r does not support: write the character itself, or \\xHH")
    return (_INSIDE if is_inside else _OUTSIDE).get(letter, text[:2]), 2
