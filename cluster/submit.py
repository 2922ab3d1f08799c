"""`p2r submit`: like `ray job submit --working-dir . -- JOB`, plus overrides and this shell's settings, without secrets.

Ray's job API has no place for a secret: it stores the runtime environment, metadata, entrypoint and uploaded files, and shows
them to everyone who may submit. The driver runs on the cluster with the identity of its node.
"""

import asyncio
import os
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

from aiohttp import ClientError
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.session import forwarded_secrets, forwarded_settings, profile_names
from p2r.console import is_plain
from p2r.data.pseudonyms import VARIABLE as PSEUDONYM_KEY
from p2r.errors import JobError, P2RError, TrainingError, error_text
from p2r.logs import as_text, say

_IGNORED = [".venv", ".git", "runs", "*.nii", "*.nii.gz", "*.tar", "*.safetensors"]


def submit(path: Path, overrides: tuple[str, ...], *, address: str | None, fork: str | None = None) -> None:
    """Submit the job, or a fork of it, follow its log, and return when it has succeeded.

    Raises:
        JobError: The job file is outside the current folder, which is uploaded to the cluster. Its name or an override has a control
            character. Or the cluster refuses the job:
            its token is missing or wrong, or no job server answers at the address.
        TrainingError: The job did not succeed.
        P2RError: The log can no longer be followed, by Ctrl-C or because the connection ended; the job runs on.
    """
    try:
        relative = path.absolute().relative_to(Path.cwd())
    except ValueError:
        raise JobError(
            f"job {path} must be inside the current folder {Path.cwd()}: the cluster gets this folder"
        ) from None
    if unsafe := [word for word in (relative.as_posix(), *overrides) if not is_plain(word)]:
        raise JobError(
            f"{unsafe[0]!r} cannot be submitted: Ray writes the command of a job into its logs, and a control character such as a line "
            "break would forge lines there. Rename the file, or write the value into it"
        )
    left_out = [*forwarded_secrets(), *(name for name in [PSEUDONYM_KEY] if name in os.environ)]
    if left_out:
        say(
            f"not passed on, because Ray stores them with the job: {', '.join(sorted(left_out))}. The cluster's nodes need their own "
            "identity: a role, a Secret, or these variables where ray start ran"
        )
    if profiles := profile_names():
        say(f"not passed on, because a profile belongs to this machine: {', '.join(profiles)}")
    arguments = [word for override in overrides for word in ("--set", override)]
    arguments += ["--fork", fork] if fork else []
    try:
        client = JobSubmissionClient(address)
        submission = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "cluster", "run", f"./{relative.as_posix()}", *arguments]),
            runtime_env={
                "working_dir": ".",
                "excludes": _IGNORED,
                "env_vars": forwarded_settings(has_own_identity=True),
            },
        )
    except AuthenticationError as error:
        raise JobError(
            f"the cluster accepts jobs only with its token ({error.message.splitlines()[0]}): set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token to the token with which its head was started"
        ) from None
    except (RuntimeError, ValueError) as error:
        if "maximum size" not in str(error):
            raise
        raise JobError(
            f"the current folder {Path.cwd()} exceeds Ray's upload limit for a job ({_size_limit_text(error)}). The largest in it are "
            f"{', '.join(_largest_files(Path.cwd()))}; list unneeded files in .rayignore, or move them"
        ) from None
    except ConnectionError:
        raise JobError(
            f"no job server answers at {address or 'the address in RAY_API_SERVER_ADDRESS or RAY_ADDRESS'}: "
            "give --address http://HOST:8265, and start the head with its dashboard"
        ) from None
    say(f"submitted {submission}")
    _follow_to_end(client, submission, address)


def _follow_to_end(client: JobSubmissionClient, submission: str, address: str | None) -> None:
    """Print the job's log until the job has ended; raise `submit`'s errors unless it succeeded."""
    try:
        asyncio.run(_follow_log(client, submission))
        state = client.get_job_status(submission)
    except KeyboardInterrupt:
        raise _runs_on(submission, address, "interrupted") from None
    except (RuntimeError, OSError, ClientError, AuthenticationError) as error:
        raise _runs_on(submission, address, f"the connection to the cluster was lost ({error_text(error)})") from None
    if not state.is_terminal():
        raise _runs_on(submission, address, "the cluster closed the connection")
    if state != JobStatus.SUCCEEDED:
        raise TrainingError(f"job {submission} ended as {state}: its log is above")


def _runs_on(submission: str, address: str | None, why: str) -> P2RError:
    """Return an error for a job that nobody follows: submitting it again would start a second driver on the same storage."""
    at = f" --address {address}" if address else ""
    return P2RError(
        f"{why}: job {submission} runs on; its log is no longer followed. `ray job logs -f{at} {submission}` follows it, "
        f"`ray job stop{at} {submission}` ends it with a checkpoint; do not submit it again"
    )


def _size_limit_text(error: Exception) -> str:
    found = re.search(r"[^.\n]*maximum size of [\d.]+ ?\w+", str(error))
    return found[0].strip() if found else "it exceeds the maximum size"


def _largest_files(folder: Path) -> list[str]:
    """Return the three largest uploaded files and folders, with their sizes."""
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        if not any(fnmatch(path.name, pattern) for pattern in _IGNORED):
            files = [path] if path.is_file() else path.rglob("*")
            sizes[path.name] = sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())
    return [
        f"{name} ({sizes[name] / 2**20:.0f} MiB)"
        for name in sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
    ]


async def _follow_log(client: JobSubmissionClient, submission: str) -> None:
    unfinished = ""
    async for lines in client.tail_job_logs(submission):
        *whole, unfinished = (unfinished + lines).split("\n")
        for line in whole:
            say(as_text(line) if sys.stderr.isatty() else line)
    if unfinished:
        say(unfinished)
