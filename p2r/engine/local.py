"""Jobs from Python: `p2r.run`, in this process and without Ray.

made = p2r.run("mine/job.yaml", pretrain__steps=20, storage="/data/try")
report = p2r.open_report(made["storage"])
"""

import json
from pathlib import Path
from typing import Any

import torch

from p2r.engine.pipeline import Say, run_job
from p2r.job import Job, read_job, validated
from p2r.logs import say as say_line


def run(job: str | Path | Job, *, say: Say = say_line, **overrides: Any) -> dict[str, Any]:
    """Run a job in this process; running it again resumes it.

    Args:
        job: Path of a job file, the name of a job that p2r brings, or a `Job`.
        say: Receives lines of progress; default: stderr.
        overrides: Fields to set, with two underscores for a dot, as in `pretrain__steps=20`.

    Returns:
        What was made, by name: `storage`, `corpus`, `checkpoint`, `backbone`, `models`, `report`, `page`, as far as the job's kind
        makes them; `failed` if trials failed.

    Raises:
        InputError: for anything in job or data that cannot be used.
    """
    from p2r.engine.__main__ import LocalExecutor

    if isinstance(job, Job):
        values = job.model_dump()
        for name, value in overrides.items():
            *parents, last = name.split("__")
            target = values
            for parent in parents:
                target = target[parent]
            target[last] = value
        ready = validated(Job, values, where="the job")
    else:
        texts = (f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in overrides.items())
        ready = read_job(Path(job), tuple(texts))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    made = run_job(ready, LocalExecutor(device, None, retries=ready.retries), say=say)
    made.pop("table", None)
    return made
