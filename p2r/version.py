"""Which code this is, for everything that it writes."""

import os
import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def code_version() -> str:
    """Return the commit that this code was taken from: `$P2R_COMMIT`, else what git says, else `unknown`."""
    if os.environ.get("P2R_COMMIT"):
        return os.environ["P2R_COMMIT"]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
