"""Publishers that race or are killed, as real processes on a folder and on a real S3 server.

A hundred races: `python -m tests.publishing races URL --races 100 --publishers 4`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def publishing(*arguments: str, repository: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.publishing", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.s3
@pytest.mark.parametrize("where", ["a folder", "a bucket"])
def test_of_racing_publishers_one_succeeds_and_killed_ones_leave_what_can_be_published_again(
    where: str, tmp_path: Path, repository: Path, request: pytest.FixtureRequest
) -> None:
    url = f"file://{tmp_path}" if where == "a folder" else request.getfixturevalue("s3_url")
    found = publishing("both", url, "--races", "4", "--publishers", "4", repository=repository)
    assert found["races"]["broken"] == [] and found["kills"]["broken"] == []
    assert found["races"]["outcomes"] == {
        **{f"{kind}: published": 1 for kind in ("card", "licence", "nothing", "weights")},
        **{f"{kind}: refused": 3 for kind in ("card", "licence", "weights")},
        "nothing: was published": 3,
    }
    assert found["kills"]["num_writes"] > 8
