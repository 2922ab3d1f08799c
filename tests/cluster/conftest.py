"""What tests of the command share."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import cli


@pytest.fixture
def p2r(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A function that calls the `p2r` command in this process: exit code, and what it wrote to stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str]:
        code = cli.main([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="p2r-", dir="/tmp") as folder:
        yield Path(folder)
