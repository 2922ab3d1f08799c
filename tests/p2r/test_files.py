"""A full disk has one message, and tables cannot execute their text in a spreadsheet."""

import csv
import errno
import tempfile
from pathlib import Path

import pytest

from p2r.files import lack_of_space, write_csv
from tests.source_names import uses_of

ROOT = Path(__file__).parents[2]


def chained(inner: Exception) -> Exception:
    """The error as it arrives: from within another one."""
    try:
        try:
            raise inner
        except Exception as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/scratch/x"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("a task of Ray failed\nOSError: [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_named_with_the_way_out(error: Exception) -> None:
    found = lack_of_space(chained(error))
    assert found is not None
    assert "a disk is full" in str(found) and tempfile.gettempdir() in str(found) and "set TMPDIR" in str(found)
    assert ("/scratch/x" in str(found)) == (getattr(error, "filename", None) is not None)


def test_other_failures_are_no_lack_of_space() -> None:
    assert lack_of_space(chained(OSError(errno.EACCES, "Permission denied"))) is None


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-2+3", "'-2+3"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("  =1", "'  =1"),
        ("\uff1d1", "'\uff1d1"),
        ("a;=1", "a;'=1"),
        ('a"=1', "a\"'=1"),
        ("\t=1\r\n=2", "?=1??=2"),
        ("\x1b]0;x\x07\u202e\udcff", "?]0;x???"),
        ("left ventricle, apex-base = 1", "left ventricle, apex-base = 1"),
    ],
)
def test_a_name_in_a_table_is_text_for_every_spreadsheet(name: str, shown: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", [name, "ml"], [[name, -0.5]])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [[shown, "ml"], [shown, "-0.5"]]


def test_every_table_is_written_by_the_one_function() -> None:
    found = [
        f"{path}:{node.lineno}"
        for folder in ("p2r", "cluster")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "p2r/files.py" and "csv" in path.read_text()
        for name, node in uses_of(path.read_text())
        if name in ("csv.writer", "csv.DictWriter") or name.endswith((".to_csv", ".savetxt"))
    ]
    assert found == [], "tables for spreadsheets are p2r.files.write_csv's"
