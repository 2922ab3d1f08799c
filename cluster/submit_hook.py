"""Hook that makes `ray job submit jobs/pretrain.yaml` work from the repository's root, against any cluster.

Ray calls the function named by `RAY_JOB_SUBMIT_HOOK` before it submits. Without `--working-dir`, Ray would look for a job's
entrypoint in the folder where the cluster's head was started. The hook runs the same command again with the option.

    export RAY_JOB_SUBMIT_HOOK=cluster.submit_hook.default_working_dir
"""

import os
import sys
from pathlib import Path
from typing import Any


def default_working_dir(*, working_dir: str | None = None, entrypoint: tuple[str, ...] = (), **_: Any) -> None:
    """Add `--working-dir .` if it is missing and the entrypoint is a job file in the current folder."""
    program = Path(entrypoint[0]) if entrypoint else None
    if working_dir is not None or program is None or program.is_absolute() or program.suffix not in (".yaml", ".yml"):
        return
    if not program.is_file():
        return
    after_submit = sys.argv.index("submit") + 1
    arguments = [*sys.argv[1:after_submit], "--working-dir", ".", *sys.argv[after_submit:]]
    # The option puts the current folder on the path, from which the client imports the hook; the next process needs it, too.
    os.execv(sys.executable, [sys.executable, sys.argv[0], *arguments])
