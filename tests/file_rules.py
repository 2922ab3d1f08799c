"""Rules for all files, for pre-commit and the tests: text ends with exactly one newline, and no file is large.

python3 tests/file_rules.py end-of-file FILE...
python3 tests/file_rules.py large-files FILE...
"""

import sys
from collections.abc import Sequence
from pathlib import Path

MAX_KIB = 512
"""A larger file belongs into a bucket or a release, not into the history of a repository."""


def wrong_ends(paths: Sequence[Path]) -> list[str]:
    """Return a message for each file that does not end with exactly one newline; empty files are fine."""
    contents = [(path, path.read_bytes()) for path in paths if path.is_file()]
    return [
        f"{path}: must end with exactly one newline"
        for path, content in contents
        if content and (not content.endswith(b"\n") or content.endswith(b"\n\n"))
    ]


def large_files(paths: Sequence[Path]) -> list[str]:
    """Return a message for each file above the limit."""
    sizes = [(path, path.stat().st_size / 1024) for path in paths if path.is_file()]
    return [f"{path}: {size:.0f} KiB, must be at most {MAX_KIB}" for path, size in sizes if size > MAX_KIB]


RULES = {"end-of-file": wrong_ends, "large-files": large_files}


def main() -> int:
    """Print the problems of the files on the command line."""
    problems = RULES[sys.argv[1]]([Path(name) for name in sys.argv[2:]])
    print(*problems, sep="\n" if problems else "", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
