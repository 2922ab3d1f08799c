"""`p2r submit`: what `ray job submit --working-dir . -- JOB` does, with overrides and the environment's credentials."""

import asyncio
import shlex
import sys
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.session import forwarded_environment
from p2r.errors import JobError, TrainingError
from p2r.logs import as_text, masked

_IGNORED = [".venv", ".git", "runs", "*.nii", "*.nii.gz", "*.tar", "*.safetensors"]


def submit(path: Path, overrides: tuple[str, ...], *, address: str | None, fork: str | None = None) -> None:
    """Submit the job, or a fork of it, follow its log, and return when it has succeeded.

    Raises:
        JobError: if the job file does not lie below the current folder, which is what the cluster gets.
        TrainingError: if the job did not succeed.
    """
    try:
        relative = path.absolute().relative_to(Path.cwd())
    except ValueError:
        raise JobError(
            f"job {path} must lie below the current folder {Path.cwd()}: the cluster gets this folder"
        ) from None
    client = JobSubmissionClient(address)
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments += ["--fork", fork] if fork else []
    submission = client.submit_job(
        entrypoint=shlex.join(["python", "-m", "cluster", "run", relative.as_posix(), *arguments]),
        runtime_env={"working_dir": ".", "excludes": _IGNORED, "env_vars": forwarded_environment()},
    )
    print(f"submitted {submission}", file=sys.stderr)
    asyncio.run(_follow(client, submission))
    state = client.get_job_status(submission)
    if state != JobStatus.SUCCEEDED:
        raise TrainingError(f"job {submission} ended as {state}: its log is above")


async def _follow(client: JobSubmissionClient, submission: str) -> None:
    unfinished = ""
    async for lines in client.tail_job_logs(submission):
        *whole, unfinished = (unfinished + lines).split("\n")
        for line in whole:
            print(as_text(line) if sys.stderr.isatty() else masked(line), file=sys.stderr, flush=True)
    if unfinished:
        print(masked(unfinished), file=sys.stderr, flush=True)
