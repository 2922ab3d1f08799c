"""Standard output of all commands, with terminal control characters removed from outside text.

    show(line) · show_json(value) · console().print(table)

Class names, file names, keys and formats come from strangers. A control character could move the cursor, change the title
or forge a line. A direction mark could reverse the text beside it; zero-width characters could make two names look the same.
Each is shown as `?`. A test checks that nothing else in p2r prints.
"""

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

UNSEEN = "\x7f-\x9f\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
"""Character class: DEL, C1, direction marks, zero-width characters, line separators, halves of surrogate pairs."""
_CONTROL_CHARACTERS = f"\x00-\x08\x0b-\x1f{UNSEEN}"
"""C0 except tab and line feed, and the above."""
_CONTROL = re.compile(f"[{_CONTROL_CHARACTERS}]")
_CONTROL_OR_BREAK = re.compile(f"[{_CONTROL_CHARACTERS}\t\n]")


def is_plain(text: str) -> bool:
    """Return True for one line without characters that `visible` replaces."""
    return _CONTROL_OR_BREAK.search(text) is None


def visible(text: str) -> str:
    """Return the text as one line that cannot control a terminal: each control character and line break becomes `?`."""
    return _CONTROL_OR_BREAK.sub("?", text)


def harmless(text: str) -> str:
    """Return text of several lines that cannot control a terminal; line feeds and tabs stay."""
    return _CONTROL.sub("?", text)


def show(line: object = "", *, flush: bool = False) -> None:
    """Print one line to stdout."""
    print(visible(str(line)), flush=flush)


def show_json(value: Any) -> None:
    """Print a value as JSON in ASCII, which escapes all control characters."""
    print(json.dumps(value, indent=2, allow_nan=False))


def console(*, width: int = 120) -> "Console":
    """Return rich's console on stdout, for tables; `width` in columns applies if stdout is not a terminal."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Harmless(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            for segment in super().render(renderable, options):
                # Rich marks its own control sequences.
                yield segment if segment.control else segment._replace(text=harmless(segment.text))

    found = Harmless()
    return found if found.is_terminal else Harmless(width=width)
