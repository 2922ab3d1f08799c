"""A disk that is full, in the words of everybody who meets it."""

import errno
import tempfile

import pytest

from p2r.files import lack_of_space


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
