"""What tests of the command share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import cli


@pytest.fixture
def p2r(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that calls the `p2r` command in this process: exit code, and what it wrote to stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["p2r", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call
