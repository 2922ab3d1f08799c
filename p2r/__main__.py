"""`python -m p2r JOB`: run a job in this process, without Ray.

    python -m p2r jobs/demo.yaml --set pretrain.steps=20 --minutes 8

`--minutes`: pretraining or the current trial saves its state when the time is over; the same command resumes it.
`--fork NAME`: a new run starts from the job's newest weights.
`--profile STEPS`: time and memory of STEPS steps are recorded, and the run continues.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from p2r.console import console, show
from p2r.errors import TrainingError
from p2r.exits import exit_code_of
from p2r.job import FORK_HELP, Job, ignored_variables, overrides_of, read_job
from p2r.logs import LogFormat, configure, say
from p2r.pipeline.finished import recorded_outputs
from p2r.pipeline.lines import FINISHED
from p2r.pipeline.outputs import Outputs
from p2r.pipeline.paths import check_job


def main(argv: Sequence[str] | None = None) -> int:
    """Run a job and return the exit code, see `p2r.exits`.

    Args:
        argv: Arguments without the name of the program. None: those of this process.
    """
    arguments = _parse(argv)
    return exit_code_of(lambda: _run_job(arguments), what="python -m p2r", is_debug=arguments.debug)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m p2r", description="Run a job in one process, without Ray.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the job")
    parser.add_argument(
        "--allow-transductive",
        action="store_true",
        help="continue although validation or test patients are in the backbone's corpus; every row of the report is labelled",
    )
    parser.add_argument("--fork", metavar="NAME", help=FORK_HELP)
    parser.add_argument("--minutes", type=float, help="save and end after this time, to resume later")
    parser.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="number of pretraining steps to profile, after a few others",
    )
    parser.add_argument("--log-format", choices=get_args(LogFormat), help="default: P2R_LOG_FORMAT, or auto")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refused input")
    arguments = parser.parse_args(argv)
    if arguments.profile < 0:
        parser.error(f"--profile must not be negative, got {arguments.profile}")
    return arguments


def _run_job(arguments: argparse.Namespace) -> int:
    configure(arguments.log_format)
    overrides = overrides_of(arguments.set, allow_transductive=arguments.allow_transductive)
    job = read_job(arguments.job, overrides)
    configure(arguments.log_format, run=job.name)
    say(f"job | {job.name} of kind {job.kind}, in {job.storage}")
    for note in ignored_variables(arguments.job, job):
        say(f"note: {note}")
    as_asked = job
    if arguments.fork:
        from p2r.pipeline.fork import forked

        job = forked(job, arguments.fork)
    made = None if arguments.profile else recorded_outputs(job)
    if made is None:
        check_job(arguments.job, as_asked)
        made = _execute(job, arguments)
    else:
        say(FINISHED)
    if made.table is not None:
        console().print(made.table)
    for line in made.lines():
        show(line)
    if made.failed:
        from p2r.fewshot.search import failure_message

        raise TrainingError(failure_message(made.failed))
    return 0


def _execute(job: Job, arguments: argparse.Namespace) -> Outputs:
    # Torch takes seconds to import, which a finished job and a refused one do not need.
    from p2r.device import this_device
    from p2r.pipeline.local import LocalExecutor
    from p2r.pipeline.stages import run_job

    executor = LocalExecutor(
        this_device(),
        arguments.minutes and arguments.minutes * 60,
        retries=job.retries,
        profile_steps=arguments.profile,
    )
    return run_job(job, executor, say=say)


if __name__ == "__main__":
    sys.exit(main())
