import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

INFRA = Path(__file__).parents[2] / "infra"
DOCKER = """#!/bin/sh
# In docker's place: the digest of an image is made of its name.
[ "$1 $2 $3 $5 $6" = "buildx imagetools inspect --format {{.Manifest.Digest}}" ] || exit 9
case $4 in *missing*) echo "ERROR: $4: not found" >&2; exit 1 ;; esac
printf 'sha256:%s\\n' "$(printf %s "$4" | sha256sum | cut -c1-64)"
"""


def pin_images(infra: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `infra/pin_images.py` for a copy of infra/, with a program in docker's place."""
    program = infra / "bin/docker"
    program.parent.mkdir(exist_ok=True)
    program.write_text(DOCKER)
    program.chmod(0o755)
    return subprocess.run(
        [sys.executable, INFRA / "pin_images.py", "--folder", infra, *arguments],
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="session")
def pinned_infra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of infra/ with the files of digests, as `infra/pin_images.py` writes them."""
    copy = tmp_path_factory.mktemp("pinned") / "infra"
    copytree(INFRA, copy, ignore=ignore_patterns("__pycache__", "secrets"))
    done = pin_images(copy, "--p2r", "registry.example/p2r:0.1.0-cuda")
    assert done.returncode == 0, done.stderr
    return copy
