"""Few-shot segmentation as science: search on validation, freeze, read the test patients once.

    tasks -> search trials -> one choice of settings per mode -> final trials (n x draw x mode) -> rows

How trials are run is the caller's: a loop here, Ray Tune on a cluster. Trials that are done already return at once, so
calling this again after a kill goes on where it stopped. A trial that fails is listed with its reason, and the others go
on; running the job again tries it again.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from p2r.errors import InputError, OutOfTime, TrainingError, error_text
from p2r.evaluate.tasks import (
    Task,
    load_task,
)
from p2r.fewshot.protocol import (
    Settings,
    Trial,
    candidates_of,
    choose_settings,
    final_trials,
    is_searched,
    search_trials,
    settings_of,
)
from p2r.fewshot.results import (
    ChosenSettings,
    FailedTrial,
    FewShot,
    Overhead,
    SearchedTrial,
    SweepTime,
    TrialResult,
    failed_result,
    failures_of,
)
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.stored import read_sweeps
from p2r.fewshot.trial import run_trial
from p2r.logs import Say
from p2r.modes import Mode
from p2r.storage import Storage, json_bytes


class TrialRunner(Protocol):
    """Who runs trials."""

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        """Run trials in any order; return their results in the given one."""

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, TrialResult]]:
        """Run the trials that `search.searcher` proposes for a mode, and return them."""

    def num_concurrent(self, num_trials: int) -> int:
        """Return how many of so many trials run at a time."""


def few_shot(setups: Sequence[TrialSetup], *, runner: TrialRunner, say: Say) -> FewShot:
    """Run the whole protocol for every task.

    Args:
        setups: One per task.
        runner: Runs trials.
        say: Receives a line for every decision.
    """
    sweep = _Sweep(runner, Storage(setups[0].root).child("finetune"), say)
    tasks = [load_task(Path(setup.task)) for setup in setups]
    outcomes = _search(setups, tasks, sweep)
    found = FewShot([])
    finals: list[tuple[TrialSetup, Trial]] = []
    for setup, task in zip(setups, tasks, strict=True):
        of_task = [(trial, result) for owner, trial, result in outcomes if owner is setup]
        found.searched += [SearchedTrial.of(trial, result) for trial, result in of_task]
        # A candidate that diverged or was stopped is out; it has its line among the searched ones.
        found.failed += failures_of(result for _, result in of_task if not result.diverged)
        chosen = _choose(setup, task, of_task, found)
        for mode, settings in chosen.items():
            values = ", ".join(f"{name} {value:g}" for name, value in settings.given().items())
            how = "chosen on validation" if is_searched(setup.config, mode) else "the only candidate"
            say(f"{task.name} | {mode} | {how}: {values}")
        finals += [(setup, trial) for trial in final_trials(setup.config, task, chosen)]
    results = sweep.run(finals)
    found.failed += failures_of(results)
    found.results = [result for result in results if result.failed is None]
    found.overhead = sweep.overhead()
    if found.overhead.num_trials:
        say(found.overhead.text())
    for failure in found.failed:
        say(f"FAILED {failure.trial}: {failure.reason}")
    return found


def _search(
    setups: Sequence[TrialSetup], tasks: Sequence[Task], sweep: "_Sweep"
) -> list[tuple[TrialSetup, Trial, TrialResult]]:
    """Run every search trial: those of a grid at once, those of a search algorithm mode by mode."""
    grid = [
        (setup, trial)
        for setup, task in zip(setups, tasks, strict=True)
        if setup.config.search.searcher == "grid"
        for trial in search_trials(setup.config, task)
    ]
    outcomes = [(setup, trial, result) for (setup, trial), result in zip(grid, sweep.run(grid), strict=True)]
    for setup in setups:
        if setup.config.search.searcher != "grid":
            for mode in setup.config.modes:
                outcomes += [(setup, trial, result) for trial, result in sweep.suggest(setup, mode)]
    return outcomes


class _Sweep:
    """Runs trials and keeps the time, of this call and of all before, on the storage."""

    def __init__(self, runner: TrialRunner, storage: Storage, say: Say) -> None:
        self._runner, self._storage, self._say = runner, storage, say

    def run(self, trials: Sequence[tuple[TrialSetup, Trial]]) -> list[TrialResult]:
        # A trial that resumes took a part of its time in an earlier call.
        missing = [not setup.is_done(trial) and not setup.is_begun(trial) for setup, trial in trials]
        began = time.monotonic()
        results = self._runner.run_trials(trials, say=self._say) if trials else []
        self._count(time.monotonic() - began, [r for r, is_new in zip(results, missing, strict=True) if is_new])
        return results

    def suggest(self, setup: TrialSetup, mode: Mode) -> list[tuple[Trial, TrialResult]]:
        before = set(Storage(setup.storage).list("trials"))
        began = time.monotonic()
        found = self._runner.suggest(setup, mode, say=self._say)
        wall_s = time.monotonic() - began
        new = [(trial, result) for trial, result in found if setup.result_path(trial) not in before]
        # If no trial has a result now, nothing was run: these were stopped in an earlier call.
        if any(setup.is_done(trial) for trial, _ in new):
            self._count(wall_s, [result for _, result in new])
        return found

    def _count(self, wall_s: float, results: Sequence[TrialResult]) -> None:
        timed = [result.seconds for result in results if result.seconds is not None]
        if timed:
            took = SweepTime(
                num_trials=len(timed),
                num_concurrent=self._runner.num_concurrent(len(timed)),
                sweep_s=wall_s,
                trials_s=math.fsum(timed),
            )
            self._storage.create(f"sweeps/{time.time_ns()}.json", json_bytes(took.to_json()))

    def overhead(self) -> Overhead:
        """Return the time that complete sweeps took beyond their trials' own time."""
        took = read_sweeps(self._storage)
        slots_s = math.fsum(one.sweep_s * one.num_concurrent for one in took)
        trials_s = math.fsum(one.trials_s for one in took)
        return Overhead(
            num_trials=sum(one.num_trials for one in took),
            num_concurrent=max((one.num_concurrent for one in took), default=0),
            sweep_s=round(math.fsum(one.sweep_s for one in took), 3),
            trials_s=round(trials_s, 3),
            overhead_fraction=slots_s / trials_s - 1 if trials_s else None,
        )


def _choose(
    setup: TrialSetup, task: Task, of_task: Sequence[tuple[Trial, TrialResult]], found: FewShot
) -> dict[Mode, Settings]:
    """Return the settings of every mode that has any left: the best of the search, or the only candidate."""
    config = setup.config
    best = choose_settings((trial, result.validation_dice if result.is_whole else None) for trial, result in of_task)
    chosen: dict[Mode, Settings] = {}
    for mode in config.modes:
        if not is_searched(config, mode):
            chosen[mode] = settings_of(config, mode, candidates_of(config, mode)[0])
        elif mode in best:
            chosen[mode] = best[mode]
        else:
            reasons = [result.failed for trial, result in of_task if trial.mode == mode and result.failed is not None]
            reason = "no candidate of its search has a figure" + "".join(f": {one}" for one in reasons[:1])
            missing = final_trials(config, task, {mode: Settings()})  # names hold no settings
            found.failed += [FailedTrial(trial=trial.id, reason=reason) for trial in missing]
            continue
        is_chosen = is_searched(config, mode)
        found.chosen.append(ChosenSettings.of(task.name, mode, chosen[mode], is_searched=is_chosen))
    return chosen


def attempt(setup: TrialSetup, trial: Trial, *, device: str, retries: int, say: Say, **options: Any) -> TrialResult:
    """Run a trial, once more after whatever went wrong, `retries` times; then say what did.

    A trial that diverged would diverge again: it is not repeated.

    Raises:
        InputError: what the user gave cannot be used; no other trial could either.
        OutOfTime: the deadline among `options` has passed.
    """
    for number in range(retries + 1):
        try:
            return run_trial(setup, trial, device=device, say=say, **options)
        except (InputError, OutOfTime):
            raise
        except TrainingError as error:
            return failed_result(trial, str(error), diverged=True)
        except Exception as error:
            reason = error_text(error)
            say(f"{trial.id} | attempt {number + 1} of {retries + 1} failed: {reason}")
    return failed_result(trial, reason)


def failure_message(failed: Sequence[Mapping[str, str]]) -> str:
    """Return what the command line says of trials that failed."""
    names = "\n".join(f"  {failure['trial']}: {failure['reason']}" for failure in failed)
    return (
        f"{len(failed)} trial{'s' * (len(failed) > 1)} failed; the report has the others; run the job again to try again, and change it "
        f"where they diverged:\n{names}"
    )
