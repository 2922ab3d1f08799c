"""Commands that read, run or submit a job: validate, run, submit, schema."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import AllowTransductive, Debug, Fork, JobPath, Overrides, print_outputs
from p2r.console import show, show_json
from p2r.errors import InputError, JobError, TrainingError
from p2r.exits import STOPPED
from p2r.logs import configure, say

if TYPE_CHECKING:
    from p2r.pipeline.outputs import Outputs


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="JOB-or-TASK...", help="Job files or task files.")],
    set_: Overrides = None,
    debug: Debug = False,
) -> None:
    """Check job and task files, and every path in them, without running anything."""
    from p2r.pipeline.paths import is_task, job_facts, task_facts

    refused = 0
    for path in files:
        try:
            if is_task(path):
                unset_in_task: dict[str, str] = {}
                facts, unset, words = [*task_facts(path, unset=unset_in_task)], list(unset_in_task), "task"
            else:
                job, unset, facts = job_facts(path, tuple(set_ or ()))
                words = f"{job.kind}  {job.storage}"
            needs = "".join(f"  needs {name}" for name in unset)
            lines = [f"valid    {path}  {words}{needs}", *(f"         {fact}" for fact in facts)]
        except InputError as error:
            refused += 1
            say(f"refused  {error}")
        else:
            for line in lines:
                show(line)
    if refused:
        raise JobError(f"{refused} of {len(files)} files refused")


def run(
    path: JobPath,
    set_: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: RAY_ADDRESS, or this machine.")] = None,
    allow_transductive: AllowTransductive = False,
    profile: Annotated[
        int, typer.Option(metavar="STEPS", min=0, help="Number of pretraining steps to profile, after a few others.")
    ] = 0,
    fork: Fork = None,
    log_format: Annotated[
        str | None,
        typer.Option(help="text, json, or auto: text on a terminal, JSON elsewhere; default: P2R_LOG_FORMAT, or auto."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a job on Ray; running it again resumes it."""
    from p2r.job import find_job, ignored_variables, overrides_of, read_job

    configure(log_format)
    job = read_job(path, overrides_of(set_, allow_transductive=allow_transductive))
    configure(log_format, run=job.name)
    say(f"job | {job.name} of kind {job.kind}, in {job.storage}")
    if (brought := find_job(path)) != path:
        say(f"job | {path}: no such file; using the job that comes with p2r, {brought}")
    for note in ignored_variables(path, job):
        say(f"note: {note}")
    from p2r.pipeline.finished import recorded_outputs
    from p2r.pipeline.lines import FINISHED
    from p2r.pipeline.paths import check_job

    as_asked = job
    if fork:
        from p2r.pipeline.fork import forked

        job = forked(job, fork)
    made = None if profile else recorded_outputs(job)
    if made is None:
        check_job(path, as_asked)
        made = _run_on_ray(job, path, address, profile_steps=profile, debug=debug)
    else:
        say(FINISHED)
    print_outputs(made)
    if made.unfinished is not None:
        raise typer.Exit(STOPPED)
    if made.failed:
        from p2r.fewshot.search import failure_message

        raise TrainingError(failure_message(made.failed))


def _run_on_ray(job: Any, path: Path, address: str | None, *, profile_steps: int, debug: bool) -> "Outputs":
    from cluster.starting import started_session

    with started_session(address, job=path, show_worker_logs=debug, say=say):
        # Torch takes seconds to import; `p2r validate` needs neither it nor Ray.
        from cluster.executor import RayExecutor
        from p2r.pipeline.stages import run_job

        with RayExecutor(job, profile_steps=profile_steps) as executor:
            made = run_job(job, executor, say=say)
            if made.failed:  # the table is written, and the exit code is 1
                executor.exporter.close(has_failed=True)
            return made


def submit(
    path: JobPath,
    set_: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="Job server, http://HOST:8265; default: RAY_API_SERVER_ADDRESS.")
    ] = None,
    allow_transductive: AllowTransductive = False,
    fork: Fork = None,
    debug: Debug = False,
) -> None:
    """Submit a job to a Ray cluster from the repository's root, and follow its log."""
    from p2r.job import overrides_of, read_job

    overrides = overrides_of(set_, allow_transductive=allow_transductive)
    read_job(path, overrides)
    from cluster.submit import submit as submit_to_ray

    submit_to_ray(path, overrides, address=address, fork=fork)


def schema() -> None:
    """Print the JSON Schema of job files."""
    from p2r.job import json_schema

    show_json(json_schema())
