"""Standard output of all commands: text from outside is shown there, and commands nothing.

    show(line) · show_json(value) · console().print(table)

Names of classes, files, keys and formats come from strangers. A control character among them would move the cursor, change the title or
forge a line; a mark of direction would turn the text beside it; what has no width would make two names look the same. Each is
shown as `?`. Nothing else of p2r prints: a test sees to it.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNSEEN = "\x7f-\x9f\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
"""For brackets of a pattern: DEL, C1, marks of direction, what has no width, line separators, halves of surrogate pairs."""
_COMMANDS = f"\x00-\x08\x0b-\x1f{UNSEEN}"
"""C0 but tab and line feed, and these."""
_UNSEEN = re.compile(f"[{_COMMANDS}]")
_UNSEEN_OR_BREAK = re.compile(f"[{_COMMANDS}\t\n]")


def is_plain(text: str) -> bool:
    """Tell whether a text is one line without a character that is replaced when it is shown."""
    return _UNSEEN_OR_BREAK.search(text) is None


def visible(text: str) -> str:
    """Return the text as one line that commands no terminal: each control character, line breaks too, becomes `?`."""
    return _UNSEEN_OR_BREAK.sub("?", text)


def harmless(text: str) -> str:
    """Return text of several lines that commands no terminal; line feeds and tabs stay."""
    return _UNSEEN.sub("?", text)


def show(line: object = "", *, flush: bool = False) -> None:
    """Print one line to stdout."""
    print(visible(str(line)), flush=flush)


def show_json(value: Any) -> None:
    """Print a value as JSON in ASCII, which escapes all that a terminal could obey."""
    print(json.dumps(value, indent=2, allow_nan=False))


def console(*, width: int = 120) -> "Console":
    """Return rich's console on stdout, for tables; `width` in columns holds where stdout is no terminal."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # Rich's own commands are marked as such.
                yield segment if segment.control else segment._replace(text=harmless(segment.text))

    found = Harmless()
    return found if found.is_terminal else Harmless(width=width)
