"""Jobs from Python: `p2r.run` runs a job in this process, without Ray.

made = p2r.run("mine/job.yaml", pretrain__steps=20, storage="/data/try")
report = p2r.open_report(made["storage"])
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from p2r.config import IngestConfig, PretrainConfig
from p2r.data.corpus import ingest_locally, report_progress
from p2r.engine.pretrain import pretrain
from p2r.engine.profile import profile_text
from p2r.errors import JobError, OutOfTime, P2RError
from p2r.fewshot.protocol import Trial
from p2r.fewshot.results import TrialResult
from p2r.fewshot.search import attempt
from p2r.fewshot.setup import TrialSetup
from p2r.job import AshaConfig, Job, read_job, validated
from p2r.logs import Line, Say, within
from p2r.logs import say as say_line
from p2r.modes import Mode
from p2r.pipeline.executor import VariantOutcome, VariantRun
from p2r.pipeline.lines import report_lines, say_for_variant
from p2r.pipeline.paths import check_job
from p2r.pipeline.stages import run_job
from p2r.storage import Storage


class LocalExecutor:
    """Runs every heavy part of a job as a loop in this process."""

    runs_variants_together = False

    def __init__(
        self, device: torch.device, max_seconds: float | None, *, retries: int = 0, profile_steps: int = 0
    ) -> None:
        self._device, self._max_seconds = device, max_seconds
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._retries, self._profile_steps = retries, profile_steps

    def ingest(self, config: IngestConfig, storage: Storage, *, subjects: frozenset[str] | None, say: Say) -> None:
        """Build shards one after another."""
        say_ingest = within(say, "ingest")
        report_progress(ingest_locally(config, storage, allowed_subjects=subjects, say=say_ingest), say_ingest)

    def pretrain(self, config: PretrainConfig, *, storage: Storage, corpus: Storage, say: Say) -> bool:
        """Train on this process's device."""
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

    def pretrain_variants(
        self, runs: Mapping[str, VariantRun], *, asha: AshaConfig | None, say: Say
    ) -> dict[str, VariantOutcome]:
        """Train variants one after another, each to its end: `asha` compares variants that run at a time."""
        found = {}
        for name, run in runs.items():
            try:
                is_done = self.pretrain(
                    run.config, storage=run.storage, corpus=run.corpus, say=say_for_variant(say, name, len(runs))
                )
                found[name] = VariantOutcome(is_done=is_done)
            except P2RError as error:
                found[name] = VariantOutcome(error=error)
        return found

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        """Run trials one after another."""
        results = []
        for number, (setup, trial) in enumerate(trials, start=1):
            if self._deadline is not None and time.monotonic() >= self._deadline and not setup.is_done(trial):
                raise OutOfTime(f"time is over before trial {number}/{len(trials)}, {trial.id}")
            result = attempt(
                setup, trial, device=self._device.type, retries=self._retries, say=say, deadline=self._deadline
            )
            dice = result.validation_dice
            text = f"{number}/{len(trials)} | {trial.id} | validation Dice {'none' if dice is None else f'{dice:.3f}'}"
            say(Line(text, trial=trial.id, validation_dice=dice, seconds=result.seconds))
            results.append(result)
        return results

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, TrialResult]]:
        """Refuse: search algorithms belong to Ray Tune."""
        raise JobError(
            f"finetune.search.searcher {setup.config.search.searcher!r} is a search algorithm of Ray Tune: run the job with p2r run, "
            "or set it to grid, which also draws candidates from distributions"
        )

    def num_concurrent(self, num_trials: int) -> int:
        """Return 1."""
        return 1


def run(job: str | Path | Job, *, say: Say = say_line, **overrides: Any) -> dict[str, Any]:
    """Run a job in this process; running it again resumes it.

    Args:
        job: Path of a job file, the name of a job that comes with p2r, or a `Job`.
        say: Receives lines of progress; default: stderr.
        overrides: Fields to set, with two underscores for a dot, as in `pretrain__steps=20`.

    Returns:
        Outputs by name: `storage`, `corpus`, `checkpoint`, `backbone`, `models`, `report`, `page`, depending on the job's kind;
        `failed` if trials failed.

    Raises:
        InputError: Something in the job or data cannot be used.
    """
    if isinstance(job, Job):
        values = job.model_dump()
        for name, value in overrides.items():
            *parents, last = name.split("__")
            target = values
            for parent in parents:
                target = target[parent]
            target[last] = value
        ready = validated(Job, values, where="the job")
        path = Path(f"{ready.name} (from Python)")
    else:
        texts = (f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in overrides.items())
        path = Path(job)
        ready = read_job(path, tuple(texts))
    check_job(path, ready)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return run_job(ready, LocalExecutor(device, None, retries=ready.retries), say=say).to_json()
