"""`python -m p2r.engine JOB`: a job in this process, without Ray.

    python -m p2r.engine jobs/demo.yaml --set pretrain.steps=20 --minutes 8

With `--minutes`, pretraining or the running trial saves its state when the time is over; the same command resumes it. With
`--fork NAME` a new run starts from the weights that the job's has reached. With
`--profile STEPS` it says where so many of its steps spend time and memory, and goes on.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from p2r.config import IngestConfig, PretrainConfig
from p2r.console import console, show
from p2r.data.corpus import ingest_locally, report_progress
from p2r.device import this_device
from p2r.engine.fewshot import Result, attempt, failure_message
from p2r.engine.finetune import TrialSetup
from p2r.engine.fork import forked
from p2r.engine.lines import made_lines, report_lines
from p2r.engine.pipeline import Say, run_job
from p2r.engine.pretrain import pretrain
from p2r.engine.profile import profile_text
from p2r.errors import InputError, JobError, OutOfTime, P2RError
from p2r.evaluate.protocol import Trial
from p2r.files import lack_of_space
from p2r.identity import ensure_identity
from p2r.job import FORK_HELP, ignored_variables, overrides_of, read_job
from p2r.logs import Line, LogFormat, configure, reset, say, say_crash, say_error, within
from p2r.modes import Mode
from p2r.storage import Storage


class LocalExecutor:
    """Every heavy part as a loop in this process."""

    def __init__(
        self, device: torch.device, max_seconds: float | None, *, retries: int = 0, profile_steps: int = 0
    ) -> None:
        self._device, self._max_seconds = device, max_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._retries, self._profile_steps = retries, profile_steps

    def ingest(self, config: IngestConfig, storage: Storage, *, subjects: frozenset[str] | None, say: Say) -> None:
        """Shard after shard."""
        say_ingest = within(say, "ingest")
        report_progress(ingest_locally(config, storage, allowed_subjects=subjects, say=say_ingest), say_ingest)

    def pretrain(self, config: PretrainConfig, *, storage: Storage, corpus: Storage, say: Say) -> bool:
        """On this process's device."""
        step = config.steps
        for report in pretrain(
            config,
            storage=storage,
            corpus=corpus,
            device=self._device,
            max_seconds=self._max_seconds,
            profile_steps=self._profile_steps,
        ):
            for line in report_lines(report):
                say(line)
            if report.profile is not None:
                say(profile_text(storage))
            step = report.step
        return step == config.steps

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[Result]:
        """One after the other."""
        results = []
        for number, (setup, trial) in enumerate(trials, start=1):
            if self._deadline is not None and time.monotonic() >= self._deadline and not setup.is_done(trial):
                raise OutOfTime(f"time is over before trial {number}/{len(trials)}, {trial.id}")
            result = attempt(
                setup, trial, device=self._device.type, retries=self._retries, say=say, deadline=self._deadline
            )
            dice = result.get("validation", {}).get("dice_mean")
            text = f"{number}/{len(trials)} | {trial.id} | validation Dice {'none' if dice is None else f'{dice:.3f}'}"
            say(Line(text, trial=trial.id, validation_dice=dice, seconds=result.get("seconds")))
            results.append(result)
        return results

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, Result]]:
        """Nobody here: search algorithms are Ray Tune's."""
        raise JobError(
            f"finetune.search.searcher {setup.config.search.searcher!r} is a search algorithm of Ray Tune: run the job with p2r run, "
            "or set it to grid, which draws candidates from distributions, too"
        )

    def num_concurrent(self, num_trials: int) -> int:
        """One."""
        return 1


def main() -> int:
    """Run a job and return the exit code."""
    try:
        return _main()
    except Exception as error:
        if (full := lack_of_space(error)) is not None:
            say_error(full, code=1)
        else:
            say_crash(error)
        return 1
    finally:
        reset()


def _main() -> int:
    if (news := ensure_identity()) is not None:
        say(news)
    parser = argparse.ArgumentParser(prog="python -m p2r.engine", description="Run a job in one process, without Ray.")
    parser.add_argument("job", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a field of the job")
    parser.add_argument(
        "--allow-transductive",
        action="store_true",
        help="go on although validation or test patients are in the backbone's corpus; every row of the report is labelled",
    )
    parser.add_argument("--fork", metavar="NAME", help=FORK_HELP)
    parser.add_argument("--minutes", type=float, help="save and end after this time, to resume later")
    parser.add_argument(
        "--profile", type=int, default=0, metavar="STEPS", help="profile so many steps of pretraining, after a few"
    )
    parser.add_argument("--log-format", choices=get_args(LogFormat), help="default: P2R_LOG_FORMAT, else auto")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a refused input")
    arguments = parser.parse_args()
    if arguments.profile < 0:
        parser.error(f"--profile must not be negative, got {arguments.profile}")

    try:
        device = this_device()
        configure(arguments.log_format)
        overrides = overrides_of(arguments.set, allow_transductive=arguments.allow_transductive)
        job = read_job(arguments.job, overrides)
        for note in ignored_variables(arguments.job, job):
            say(f"note: {note}")
        if arguments.fork:
            job = forked(job, arguments.fork)
        configure(arguments.log_format, run=job.name)
        executor = LocalExecutor(
            device,
            arguments.minutes and arguments.minutes * 60,
            retries=job.retries,
            profile_steps=arguments.profile,
        )
        made = run_job(job, executor, say=say)
    except KeyboardInterrupt:
        say("p2r: interrupted; run the same command again to go on from the newest checkpoint")
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
        say_error(failure_message(failed), code=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
