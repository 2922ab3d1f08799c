"""Standard output: names from outside are text there, and nothing prints past `p2r.console`."""

import json
import re
from pathlib import Path

import pytest
from rich.table import Table

from p2r.console import console, harmless, show, show_json, visible
from tests.source_names import calls_of

ROOT = Path(__file__).parents[2]
COMMANDS = "\x1b[2J\x1b]0;title\x07\r\x08\x7f\x9b31m\u202e\u2066\u200f\u2028\udc80"


def test_a_name_commands_nothing_and_forges_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"class {COMMANDS}\nsound    forged\tx")
    show_json({COMMANDS: [COMMANDS]})
    table = Table("name")
    table.add_row(COMMANDS.replace("\r", ""))
    console().print(table)
    line, rest = capsys.readouterr().out.split("\n", 1)
    assert line == f"class {visible(COMMANDS)}?sound    forged?x" and line.isprintable()
    assert rest.replace("\n", "").isprintable()
    assert json.loads(rest[: rest.index("}") + 1]) == {COMMANDS: [COMMANDS]}


def test_every_character_that_a_terminal_obeys_is_shown_as_a_question_mark() -> None:
    assert visible("\x1b[2J\r\u202e\n\t\udc80") == "?[2J?????"
    for code in (
        *range(32),
        *range(0x7F, 0xA0),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0x200E,
        0x200F,
        0x61C,
        0xAD,
        0x200B,
        0x200D,
        0x2060,
        0xFEFF,
        0xE0041,
    ):
        assert visible(chr(code)) == "?"
        assert harmless(chr(code)) == (chr(code) if chr(code) in "\t\n" else "?")
    assert visible("Herz, cœur, 心臓, قلب 🫀") == "Herz, cœur, 心臓, قلب 🫀"


def test_nothing_prints_past_the_one_function() -> None:
    found = []
    for path in (path for folder in ("p2r", "cluster") for path in (ROOT / folder).rglob("*.py")):
        # The last one runs without p2r.
        if path.relative_to(ROOT).as_posix() in ("p2r/console.py", "p2r/logs.py", "p2r/export/add_to_plans.py"):
            continue
        text = path.read_text()
        if not re.search("print|Console|echo|stdout|stderr", text):
            continue
        found += [f"{path}:{node.lineno}: {name}" for name, node in calls_of(text) if _prints(name)]
    assert found == [], "stdout is p2r.console's, stderr p2r.logs'"


def _prints(function: str) -> bool:
    *before, last = function.split(".")
    is_stream = {"stdout", "stderr"} & set(before) and last in ("write", "writelines")
    return (
        bool(is_stream)
        or last in ("print_json", "echo", "secho", "echo_via_pager", "Console", "pprint")
        or function
        in (
            "print",
            "rich.print",
            "builtins.print",
        )
    )


@pytest.mark.parametrize(
    "text",
    [
        "print(x)",
        "from rich import print as show\nshow(x)",
        "from sys import stdout as out\nout.write(x)",
        "import sys as system\nsystem.stdout.buffer.write(x)",
        "import rich.console\nrich.console.Console()",
        "from typer import echo as say\nsay(x)",
    ],
)
def test_what_prints_is_found_under_any_name(text: str) -> None:
    assert any(_prints(name) for name, _ in calls_of(text))
