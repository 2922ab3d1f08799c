"""The few-shot protocol: search on validation patients, freeze the settings, evaluate test patients once.

    tasks -> search trials -> one choice of settings per mode -> final trials (n x draw x mode) -> rows

The caller provides the runner of trials: a loop on one machine, Ray Tune on a cluster. Finished trials return at once, so
a killed job continues where it stopped. Failed trials are listed with their reasons, and retried when the job runs again.
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
    failures_text,
)
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.stored import read_sweeps
from p2r.fewshot.trial import run_trial
from p2r.logs import Say, within
from p2r.modes import Mode
from p2r.storage import Storage, json_bytes


class TrialRunner(Protocol):
    """Runs trials."""

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[TrialResult]:
        """Run trials in any order; return their results in the order of `trials`."""

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, TrialResult]]:
        """Run the trials that `search.searcher` proposes for a mode; return them with their results."""

    def num_concurrent(self, num_trials: int) -> int:
        """Return the number of concurrent trials, at most `num_trials`."""


def few_shot(setups: Sequence[TrialSetup], *, runner: TrialRunner, say: Say) -> FewShot:
    """Run the whole protocol for every task.

    Args:
        setups: One per task.
        runner: Runner of the trials.
        say: Called with a line per decision.
    """
    storage = Storage(setups[0].root)
    return few_shot_together({"": setups}, runner=runner, storage=storage, say=say)[""]


def few_shot_together(
    groups: Mapping[str, Sequence[TrialSetup]], *, runner: TrialRunner, storage: Storage, say: Say
) -> dict[str, FewShot]:
    """Run the whole protocol for several groups of tasks at a time, such as the variants of an ablation.

    Groups share no choice and no result: only the runner has their trials together.

    Args:
        groups: Setups by name of the group.
        runner: Runner of the trials.
        storage: Storage whose `finetune/sweeps` has the time of the sweeps.
        say: Called with a line per decision.
    """
    sweep = _Sweep(runner, storage.child("finetune"), say)
    tasks = {setup.task: load_task(Path(setup.task)) for setups in groups.values() for setup in setups}
    outcomes = _run_searches([setup for setups in groups.values() for setup in setups], tasks, sweep)
    found = {name: FewShot([]) for name in groups}
    finals: list[tuple[str, TrialSetup, Trial]] = []
    for name, setups in groups.items():
        say_one = within(say, name) if name and len(groups) > 1 else say
        for setup in setups:
            of_task = [(trial, result) for owner, trial, result in outcomes if owner is setup]
            chosen = _choose(setup, tasks[setup.task], of_task, found[name], say_one)
            finals += [(name, setup, trial) for trial in final_trials(setup.config, tasks[setup.task], chosen)]
    results = sweep.run([(setup, trial) for _, setup, trial in finals])
    for (name, _, _), result in zip(finals, results, strict=True):
        found[name].failed += failures_of([result])
        found[name].results += [result] if result.failed is None else []
    overhead = sweep.overhead()
    if overhead.num_trials:
        say(overhead.text())
    for name, one in found.items():
        if len(groups) == 1:  # the time of several groups together is not the time of one
            one.overhead = overhead
        for failure in one.failed:
            say(f"FAILED {f'{name} | ' * (len(groups) > 1)}{failure.trial}: {failure.reason}")
    return found


def _choose(
    setup: TrialSetup, task: Task, of_task: Sequence[tuple[Trial, TrialResult]], found: FewShot, say: Say
) -> dict[Mode, Settings]:
    """Return the settings by mode, and record the search in `found`."""
    found.searched += [SearchedTrial.of(trial, result) for trial, result in of_task]
    # A candidate that diverged or was stopped is excluded, and listed in `searched`.
    found.failed += failures_of(result for _, result in of_task if not result.diverged)
    chosen = _choose_by_mode(setup, task, of_task, found)
    for mode, settings in chosen.items():
        values = ", ".join(f"{name} {value:g}" for name, value in settings.given().items())
        how = "chosen on validation" if is_searched(setup.config, mode) else "the only candidate"
        say(f"{task.name} | {mode} | {how}: {values}")
    return chosen


def _run_searches(
    setups: Sequence[TrialSetup], tasks: Mapping[str, Task], sweep: "_Sweep"
) -> list[tuple[TrialSetup, Trial, TrialResult]]:
    """Run every search trial: grids together, search algorithms mode by mode."""
    grid = [
        (setup, trial)
        for setup in setups
        if setup.config.search.searcher == "grid"
        for trial in search_trials(setup.config, tasks[setup.task])
    ]
    outcomes = [(setup, trial, result) for (setup, trial), result in zip(grid, sweep.run(grid), strict=True)]
    for setup in setups:
        if setup.config.search.searcher != "grid":
            for mode in setup.config.modes:
                outcomes += [(setup, trial, result) for trial, result in sweep.suggest(setup, mode)]
    return outcomes


class _Sweep:
    """Runs trials, and records the time of every call on the storage."""

    def __init__(self, runner: TrialRunner, storage: Storage, say: Say) -> None:
        self._runner, self._storage, self._say = runner, storage, say

    def run(self, trials: Sequence[tuple[TrialSetup, Trial]]) -> list[TrialResult]:
        # A resumed trial is not timed, because part of its time belongs to an earlier call.
        missing = [not setup.is_done(trial) and not setup.is_begun(trial) for setup, trial in trials]
        began = time.monotonic()
        results = self._runner.run_trials(trials, say=self._say) if trials else []
        self._record_time(time.monotonic() - began, [r for r, is_new in zip(results, missing, strict=True) if is_new])
        return results

    def suggest(self, setup: TrialSetup, mode: Mode) -> list[tuple[Trial, TrialResult]]:
        before = set(Storage(setup.storage).list("trials"))
        began = time.monotonic()
        found = self._runner.suggest(setup, mode, say=self._say)
        wall_s = time.monotonic() - began
        new = [(trial, result) for trial, result in found if setup.result_path(trial) not in before]
        # Without any stored result, nothing was run: the trials were stopped in an earlier call.
        if any(setup.is_done(trial) for trial, _ in new):
            self._record_time(wall_s, [result for _, result in new])
        return found

    def _record_time(self, wall_s: float, results: Sequence[TrialResult]) -> None:
        timed = [result.seconds for result in results if result.seconds is not None]
        if timed:
            sweep = SweepTime(
                num_trials=len(timed),
                num_concurrent=self._runner.num_concurrent(len(timed)),
                sweep_s=wall_s,
                trials_s=math.fsum(timed),
            )
            self._storage.create(f"sweeps/{time.time_ns()}.json", json_bytes(sweep.to_json()))

    def overhead(self) -> Overhead:
        """Return the time of all sweeps compared with the time of their trials."""
        sweeps = read_sweeps(self._storage)
        slots_s = math.fsum(one.sweep_s * one.num_concurrent for one in sweeps)
        trials_s = math.fsum(one.trials_s for one in sweeps)
        return Overhead(
            num_trials=sum(one.num_trials for one in sweeps),
            num_concurrent=max((one.num_concurrent for one in sweeps), default=0),
            sweep_s=round(math.fsum(one.sweep_s for one in sweeps), 3),
            trials_s=round(trials_s, 3),
            overhead_fraction=slots_s / trials_s - 1 if trials_s else None,
        )


def _choose_by_mode(
    setup: TrialSetup, task: Task, of_task: Sequence[tuple[Trial, TrialResult]], found: FewShot
) -> dict[Mode, Settings]:
    """Return the settings by mode: the best of the search, or the only candidate. A mode is missing if all candidates failed."""
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
            reason = "no candidate of its search has a result" + "".join(f": {one}" for one in reasons[:1])
            missing = final_trials(config, task, {mode: Settings()})  # names do not contain settings
            found.failed += [FailedTrial(trial=trial.id, reason=reason) for trial in missing]
            continue
        is_chosen = is_searched(config, mode)
        found.chosen.append(ChosenSettings.of(task.name, mode, chosen[mode], is_searched=is_chosen))
    return chosen


def attempt(setup: TrialSetup, trial: Trial, *, device: str, retries: int, say: Say, **options: Any) -> TrialResult:
    """Run a trial, with up to `retries` repetitions after unexpected errors; return its result or its failure.

    A diverged trial is not repeated, because it would diverge again.

    Raises:
        InputError: The user's input is invalid, so every other trial would fail, too.
        OutOfTime: The deadline in `options` has passed.
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


def failure_message(failed: Sequence[FailedTrial]) -> str:
    """Return the command line's message about failed trials."""
    names = "\n".join(f"  {failure.trial}: {failure.reason}" for failure in failed)
    return (
        f"{failures_text(failed)} failed; the report has the others; run the job again to retry them, and change "
        f"the settings of trials that diverged:\n{names}"
    )
