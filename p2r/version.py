"""Version and commit of this code, recorded in everything that it writes."""

import os
import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def code_version() -> str:
    """Return the commit of this code: `$P2R_COMMIT`, or the wheel's, or from git in a clone, or `unknown`."""
    if os.environ.get("P2R_COMMIT"):
        return os.environ["P2R_COMMIT"]
    package = Path(__file__).parent
    if (package / "COMMIT").exists():
        return (package / "COMMIT").read_text()
    if not (package.parent / ".git").exists():  # an environment may be inside another repository
        return "unknown"
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=package,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
