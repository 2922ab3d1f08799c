"""Text from outside (names of jobs, tasks, classes, patients; messages) -> text that is only text, wherever it is put.

Whoever names a class `<script>` or a patient `a|b` shall see that name in the report, and nothing else of it. A line is
cleaned once (`one_line`) and then escaped for where it goes: HTML, Markdown, a picture, a terminal, a file's name.
"""

import html
import re
import unicodedata

_UNSEEN = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd", "Cn": "\ufffd"}
"""Controls and line breaks, halves of surrogate pairs, and what is no character at all: no XML may hold them."""
_TURNING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])
"""Marks that turn the direction of writing, also of what stands behind them."""


def one_line(text: object) -> str:
    """Return the text in one line, without characters that are not seen, or that change what is seen beside them."""
    seen = (_UNSEEN.get(unicodedata.category(character), character) for character in str(text).translate(_TURNING))
    return " ".join("".join(seen).split())


def for_html(text: object) -> str:
    """Return the text as it may stand between tags, and in a quoted attribute."""
    return html.escape(one_line(text), quote=True)


def for_markdown(text: object) -> str:
    """Return the text as it may stand in a paragraph, a heading or a table's cell."""
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", one_line(text))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # within a word an underscore means nothing
    line = re.sub(r"^(\d*)([#+\-=.)])(?=[\s#+\-=.)]|$)", r"\1\\\2", line)  # a heading, a list, a rule
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def for_markdown_code(text: object) -> str:
    """Return the text as code in a paragraph or a table's cell, where nothing else than a backtick and a bar means anything."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def for_picture(text: object, most: int = 60) -> str:
    """Return the text as Matplotlib may draw it: no formula, and not longer than there is room."""
    return shortened(text, most).replace("$", r"\$")


def shortened(text: object, most: int) -> str:
    """Return at most so many characters of the text, its end replaced by an ellipsis if it is longer."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def signed(value: float, digits: int) -> str:
    """Return a difference with its sign; a minus is as wide as a plus, and no hyphen."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def for_file_name(text: object) -> str:
    """Return lower-case letters, digits and dashes that may be a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", one_line(text).lower()).strip("-")[:60] or "unnamed"
