"""Escaping of outside text (names of jobs, tasks, classes, patients; messages) for every place where it is shown.

A class named `<script>` or a patient named `a|b` appears in the report under exactly that name. A line is cleaned once
(`one_line`) and then escaped for its target: HTML, Markdown, a picture, a terminal, a file name.
"""

import html
import re
import unicodedata

_REPLACEMENTS = {"Cc": " ", "Zl": " ", "Zp": " ", "Cs": "\ufffd", "Cn": "\ufffd"}
"""Replacements of controls, line breaks, halves of surrogate pairs and unassigned code points, which XML does not allow."""
_DIRECTION_MARKS = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F])
"""Marks that change the direction of writing, even of the text after them."""


def one_line(text: object) -> str:
    """Return the text as one line, without invisible characters or marks that change the text beside them."""
    seen = (
        _REPLACEMENTS.get(unicodedata.category(character), character)
        for character in str(text).translate(_DIRECTION_MARKS)
    )
    return " ".join("".join(seen).split())


def for_html(text: object) -> str:
    """Escape the text for HTML, between tags or in a quoted attribute."""
    return html.escape(one_line(text), quote=True)


def for_markdown(text: object) -> str:
    """Escape the text for a paragraph, heading or table cell."""
    line = re.sub(r"([\\`*\[\]|~])", r"\\\1", one_line(text))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # underscores inside a word have no meaning
    line = re.sub(r"^(\d*)([#+\-=.)])(?=[\s#+\-=.)]|$)", r"\1\\\2", line)  # a heading, a list, a rule
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def for_markdown_code(text: object) -> str:
    """Return the text as inline code for a paragraph or table cell, where only backticks and bars have a meaning."""
    return f"`{one_line(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def for_picture(text: object, most: int = 60) -> str:
    """Return the text for Matplotlib: no formulas, and shortened to fit."""
    return shortened(text, most).replace("$", r"\$")


def shortened(text: object, most: int) -> str:
    """Return at most `most` characters of the text, ending in an ellipsis if it is longer."""
    line = one_line(text)
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def signed(value: float, digits: int) -> str:
    """Return a difference with its sign; the minus sign is as wide as the plus."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def for_file_name(text: object) -> str:
    """Return lower-case letters, digits and dashes that are valid in a file name."""
    return re.sub(r"[^a-z0-9]+", "-", one_line(text).lower()).strip("-")[:60] or "unnamed"
