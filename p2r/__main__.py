"""`python -m p2r JOB`: run a job in this process, without Ray.

    python -m p2r jobs/demo.yaml --set pretrain.steps=20 --minutes 8

`--minutes`: pretraining or the current trial saves its state when the time is over; the same command resumes it.
`--fork NAME`: a new run starts from the job's newest weights.
`--profile STEPS`: time and memory of STEPS steps are recorded, and the run continues.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any, get_args

from p2r.console import console, show
from p2r.errors import InputError, P2RError, missing_package
from p2r.files import lack_of_space
from p2r.identity import ensure_identity
from p2r.job import FORK_HELP, Job, ignored_variables, overrides_of, read_job
from p2r.logs import LogFormat, configure, reset, say, say_crash, say_error
from p2r.pipeline.finished import made_before
from p2r.pipeline.lines import FINISHED, made_lines


def main() -> int:
    """Run a job and return the exit code."""
    try:
        return _main()
    except ModuleNotFoundError as error:
        if (lacking := missing_package(error, what="python -m p2r")) is None:
            say_crash(error)
            return 1
        say_error(lacking, code=2)
        return 2
    except Exception as error:
        if (full := lack_of_space(error)) is not None:
            say_error(full, code=1)
        else:
            say_crash(error)
        return 1
    finally:
        reset()


def _main() -> int:
    if (notice := ensure_identity()) is not None:
        say(notice)
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
    arguments = parser.parse_args()
    if arguments.profile < 0:
        parser.error(f"--profile must not be negative, got {arguments.profile}")
    try:
        configure(arguments.log_format)
        overrides = overrides_of(arguments.set, allow_transductive=arguments.allow_transductive)
        job = read_job(arguments.job, overrides)
        for note in ignored_variables(arguments.job, job):
            say(f"note: {note}")
        if arguments.fork:
            from p2r.pipeline.fork import forked

            job = forked(job, arguments.fork)
        configure(arguments.log_format, run=job.name)
        made = None if arguments.profile else made_before(job)
        if made is None:
            made = _run(job, arguments)
        else:
            say(FINISHED)
    except KeyboardInterrupt:
        say("p2r: interrupted; run the same command again to resume from the newest checkpoint")
        return 130
    except P2RError as error:
        if arguments.debug:
            say(traceback.format_exc().rstrip())
        code = 2 if isinstance(error, InputError) else 1
        say_error(error, code=code)
        return code
    table = made.pop("table", None)
    if table is not None:
        console().print(table)
    failed = made.pop("failed", [])
    for line in made_lines(made):
        show(line)
    if failed:
        from p2r.fewshot.search import failure_message

        say_error(failure_message(failed), code=1)
    return 1 if failed else 0


def _run(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
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
