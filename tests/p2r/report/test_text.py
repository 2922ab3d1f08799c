"""Text from outside is text, wherever it stands."""

import html
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

from p2r.report.text import for_file_name, for_html, for_markdown, for_picture, one_line

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'; alert(1) //",
    "a|b",
    "two\nlines\r\nof \x1b[31mtext\x00",
    "$\\frac{1}{$",
    "[link](javascript:alert(1))",
    "![x](http://evil/x.png)",
    "`code` *bold* _slanted_ ~gone~ \\ &amp;",
    "# heading",
    "1. item",
    "\ud800half",
    "right\u202eto left",
    "../../etc/passwd",
    "]]>--></svg><svg onload=alert(1)>",
    "- item",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_html_gives_back_the_text_and_no_tag(text: str) -> None:
    class Parser(HTMLParser):
        data = ""

        def handle_starttag(self, tag: str, attrs: object) -> None:
            raise AssertionError(tag)

        def handle_data(self, data: str) -> None:
            self.data += data

    parser = Parser(convert_charrefs=True)
    parser.feed(for_html(text))
    parser.close()
    assert parser.data == one_line(text)
    assert not {'"', "'", "<"} & set(for_html(text))


@given(st.text())
def test_one_line_is_one_line_that_can_be_written(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) <= 1
    line.encode()
    assert html.unescape(for_html(text)) == html.unescape(html.escape(line))


@given(st.text(alphabet="ab|\\`*_[]<>~&\n#+-=.1 $"))
def test_markdown_holds_no_character_that_means_something(text: str) -> None:
    escaped = for_markdown(text)
    assert "\n" not in escaped and "<" not in escaped
    bare = ""
    at = 0
    while at < len(escaped):
        skipped = 2 if escaped[at] == "\\" else 1
        bare += escaped[at] if skipped == 1 else ""
        at += skipped
    assert not {"|", "`", "*", "[", "]", "~"} & set(bare)
    assert not escaped.startswith(("# ", "- ", "+ "))


@pytest.mark.parametrize("text", ["fine_tune", "leak_free", "CC-BY-NC-SA-4.0", "patient001", "0.74 ± 0.02", "-0.088"])
def test_plain_names_and_figures_stay_as_they_are(text: str) -> None:
    assert for_markdown(text) == for_html(text) == for_picture(text) == text


@given(st.text(alphabet="$\\ab{}"))
def test_no_name_is_a_formula(text: str) -> None:
    assert not is_math_text(for_picture(text))


@pytest.mark.parametrize("text", [*HOSTILE, "", "..", "/"])
def test_a_file_name_stays_in_its_folder(text: str) -> None:
    name = for_file_name(text)
    assert name and not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789-")
