"""Few-shot trials on Ray Tune: every trial is a function call that writes its result to the job's storage.

Tune places trials, gives each its share of CPUs and GPUs, and restarts one whose process dies. It also stops candidates that
fall behind (`search.scheduler`) and proposes new ones (`search.searcher`). Schedulers and searchers must compare like with
like, so each task and mode then becomes its own experiment.

A trial's result is stored as soon as it ends, and so is the fact that it was stopped. A killed sweep therefore resumes with
the missing trials, from any machine and under any executor, which Tune's own state does not allow. Only the knowledge of a
searcher is kept in that state; `Tuner.restore` restores its experiment.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from pydantic import BaseModel
from ray import tune
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.schedulers import create_scheduler
from ray.tune.search import create_searcher

from cluster.pretrain import ray_folder
from cluster.progress import relay
from cluster.session import Credentials, credentials, num_cpus, num_gpus
from p2r.config import Distribution, SearchConfig
from p2r.errors import DataError, JobError, masked_errors
from p2r.evaluate.tasks import load_task
from p2r.fewshot.protocol import Trial, numbers_of, search_trial, space_of
from p2r.fewshot.results import TrialResult, failed_result, stopped_result
from p2r.fewshot.setup import TrialSetup
from p2r.fewshot.stored import read_candidates, read_result
from p2r.job import Resources
from p2r.logs import Line, Say, counted
from p2r.masking import is_secret_name, masked
from p2r.modes import Mode
from p2r.storage import Storage, json_bytes

Count = Callable[[Mapping[str, int]], None]
"""Receives the number of trials in each state: pending, running, paused, done, failed."""
_STATES = {"PENDING": "pending", "RUNNING": "running", "PAUSED": "paused", "TERMINATED": "done", "ERROR": "failed"}
_COUNT_S = 1.0
_ASHA = ("asha", "async_hyperband", "asynchyperband")
# Tune copies these variables into the runtime environment of each trial, which Ray logs. Trials get keys as all workers do, from
# `cluster.session`.
ENV_VARS_TO_PROPAGATE.difference_update([name for name in ENV_VARS_TO_PROPAGATE if is_secret_name(name)])


def run_trials(
    trials: Sequence[tuple[TrialSetup, Trial]],
    *,
    resources: Resources,
    retries: int,
    say: Say,
    count: Count | None = None,
) -> list[TrialResult]:
    """Run the trials whose results are missing, and return all results in the order of `trials`.

    A trial that diverged, or failed after `retries` restarts, has its reason in place of its result.

    Raises:
        DataError: A trial found invalid input.
    """

    def ended(index: int, last: _LastReport) -> None:
        setup, trial = trials[index]
        stopped = _stopped_result(trial, last)
        if stopped is not None and not setup.is_done(trial):
            Storage(setup.storage).write_json(setup.stopped_path(trial), stopped.to_json())

    _TrialCounter.count, _TrialCounter.ended = count, ended
    missing = [index for index, (setup, trial) in enumerate(trials) if not setup.is_done(trial)]
    others: dict[int, TrialResult] = {}
    if missing:
        say(f"{len(missing)} trial{'s' * (len(missing) > 1)} to run, {len(trials) - len(missing)} done already")
        say_each = counted(say, len(missing))
        for number, indices in enumerate(_group_trials(trials, missing)):
            with relay(say_each) as queue:
                tuner = tune.Tuner(
                    _with_resources(
                        tune.with_parameters(_run_listed, trials=list(trials), queue=queue, given=credentials()),
                        resources,
                    ),
                    param_space={"index": tune.grid_search(indices)},
                    # A new process imports torch and MONAI for ten seconds: reuse processes for successive trials.
                    tune_config=tune.TuneConfig(
                        metric="validation_dice",
                        mode="max",
                        reuse_actors=True,
                        scheduler=_scheduler_of(*trials[indices[0]]),
                    ),
                    run_config=_run_config(
                        f"finetune-{time.strftime('%Y%m%d-%H%M%S')}-{number}", trials[0][0], retries
                    ),
                )
                for outcome in tuner.fit():
                    index = outcome.config["index"] if outcome.config else None
                    if index is not None and not trials[index][0].is_done(trials[index][1]):
                        others[index] = _missing_result(trials[index][1], outcome)
    return [
        others.get(index) or setup.stored(trial) or _lost_result(trial) for index, (setup, trial) in enumerate(trials)
    ]


def suggest(
    setup: TrialSetup, mode: Mode, *, resources: Resources, retries: int, say: Say, count: Count | None = None
) -> list[tuple[Trial, TrialResult]]:
    """Run and return the trials that a search algorithm of Tune proposes; after a kill, only the missing ones are run.

    Raises:
        JobError: Tune does not have this algorithm, or its package is not installed.
        DataError: See `run_trials`.
    """
    _TrialCounter.count, _TrialCounter.ended = count, None
    search, task = setup.config.search, load_task(Path(setup.task))
    (num_labelled,) = numbers_of(search.num_labelled, task)
    storage = Storage(setup.storage)
    recipe = {
        "search": search.model_dump(mode="json"),
        "mode": mode,
        "trial": setup.recipe_sha256(search_trial(setup.config, task, mode, num_labelled, {"learning_rate": 1.0})),
    }
    digest = hashlib.sha256(json_bytes(recipe)).hexdigest()[:12]
    done = f"searches/{mode}-{digest}.json"
    space = {name: _tune_space(candidates) for name, candidates in space_of(setup.config, mode).items()}
    if not space:
        return []
    if storage.exists(done):
        candidates = read_candidates(storage, done)
    else:
        candidates = []
        with relay(say) as queue:
            trainable = _with_resources(
                tune.with_parameters(
                    _run_proposed, setup=setup, mode=mode, num_labelled=num_labelled, queue=queue, given=credentials()
                ),
                resources,
            )
            run_config = _run_config(f"search-{task.name}-{mode}-{digest}", setup, retries)
            for outcome in _new_or_restored_tuner(trainable, space, setup, mode, run_config, say=say).fit():
                if outcome.config is not None:
                    trial = search_trial(setup.config, task, mode, num_labelled, outcome.config)
                    is_whole = storage.exists(setup.result_path(trial))
                    candidates.append((outcome.config, None if is_whole else _missing_result(trial, outcome)))
        if not any(other is not None and other.failed is not None for _, other in candidates):
            storage.write_json(done, [(candidate, other and other.to_json()) for candidate, other in candidates])
    found = []
    for candidate, other in candidates:
        trial = search_trial(setup.config, task, mode, num_labelled, candidate)
        found.append((trial, other or read_result(storage, setup.result_path(trial))))
    return found


def _new_or_restored_tuner(
    trainable: Any, space: dict[str, Any], setup: TrialSetup, mode: Mode, run_config: tune.RunConfig, *, say: Say
) -> tune.Tuner:
    """Return the tuner of a search, restored with its searcher's knowledge if the search was stopped."""
    where = f"{run_config.storage_path}/{run_config.name}"
    if tune.Tuner.can_restore(where):
        say(f"search of {mode} resumes where it was stopped")
        return tune.Tuner.restore(where, trainable=trainable, param_space=space, restart_errored=True)
    search = setup.config.search
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="validation_dice",
            mode="max",
            num_samples=search.num_samples,
            search_alg=_new_searcher(search, setup.config.seed),
            scheduler=_new_scheduler(setup, mode) if search.scheduler != "none" else None,
            reuse_actors=True,
        ),
        run_config=run_config,
    )


def num_concurrent(num_trials: int, resources: Resources) -> int:
    """Return how many of `num_trials` trials the cluster can run at once."""
    gpus = _gpus_per_trial(resources)
    room = [num_cpus() / resources.cpus_per_trial, *([num_gpus() / gpus] if gpus else [])]
    return max(1, min(num_trials, *(int(places) for places in room)))


def _group_trials(trials: Sequence[tuple[TrialSetup, Trial]], missing: Sequence[int]) -> list[list[int]]:
    """Group trials that Tune may compare: by job, task and mode with a scheduler, otherwise all together."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in missing:
        setup, trial = trials[index]
        groups.setdefault((setup.root, trial.task, trial.mode) if _is_scheduled(setup, trial) else (), []).append(index)
    return list(groups.values())


def _is_scheduled(setup: TrialSetup, trial: Trial) -> bool:
    return setup.config.search.scheduler != "none" and trial.purpose == "search"


def _missing_result(trial: Trial, outcome: Any) -> TrialResult:
    """Return the reason that a trial left no result: it failed, diverged, or was stopped for falling behind."""
    last = _LastReport.model_validate(outcome.metrics or {})
    if last.refused is not None:
        raise DataError(last.refused)
    stopped = None if outcome.error is not None else _stopped_result(trial, last)
    if stopped is not None:
        return stopped
    reason = last.failed or masked(str(outcome.error or "it ended without a result")).strip().splitlines()[-1]
    return failed_result(trial, reason, diverged=last.failed is not None)


class _LastReport(BaseModel):
    """The last report of a trial to Tune, which adds keys of its own."""

    step: int | None = None
    validation_dice: float = 0.0
    time_total_s: float = 0.0
    failed: str | None = None
    """Reason that the training failed."""
    refused: str | None = None
    """Reason that the job's input cannot be used."""


def _stopped_result(trial: Trial, last: _LastReport) -> TrialResult | None:
    """Return a stopped trial's last report; None if it made none, or was not stopped."""
    if last.failed is not None or last.refused is not None or last.step is None:
        return None
    return stopped_result(trial, step=last.step, validation_dice=last.validation_dice, seconds=last.time_total_s)


def _lost_result(trial: Trial) -> TrialResult:
    return failed_result(trial, "Ray Tune returned no outcome for it")


def _run_listed(
    config: dict[str, int], *, trials: list[tuple[TrialSetup, Trial]], queue: Any, given: Credentials
) -> None:
    given.take()
    is_several = len({setup.root for setup, _ in trials}) > 1
    setup, trial = trials[config["index"]]
    with masked_errors():
        _run_trial(setup, trial, queue=queue, label=f"{setup.root.rpartition('/')[2]} | " if is_several else "")


def _run_proposed(
    config: dict[str, float], *, setup: TrialSetup, mode: Mode, num_labelled: int, queue: Any, given: Credentials
) -> None:
    given.take()
    with masked_errors():
        trial = search_trial(setup.config, load_task(Path(setup.task)), mode, num_labelled, config)
        _run_trial(setup, trial, queue=queue)


def _run_trial(setup: TrialSetup, trial: Trial, *, queue: Any, label: str = "") -> None:
    import torch

    from p2r.errors import InputError, TrainingError
    from p2r.fewshot.trial import run_trial

    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"

    def report(step: int, dice: float) -> None:
        tune.report({"validation_dice": dice, "step": step})

    try:
        result = run_trial(
            setup, trial, device=device, say=queue.put, report=report if _is_scheduled(setup, trial) else None
        )
    except TrainingError as error:  # a restart would diverge again
        tune.report({"validation_dice": 0.0, "failed": str(error)})
        return
    except InputError as error:
        tune.report({"validation_dice": 0.0, "refused": str(error)})
        return
    dice, row = result.validation_dice, result.row
    text = (
        f"{label}{trial.id} | validation Dice {'none' if dice is None else f'{dice:.3f}'}"
        + (f" | test Dice {row.dice_mean:.3f}" if row is not None and row.split == "test" and row.dice_mean else "")
        + f" | {result.seconds or 0.0:.0f} s"
    )
    queue.put(Line(text, trial=trial.id, validation_dice=dice, seconds=result.seconds))
    tune.report({"validation_dice": dice or 0.0, "step": trial.settings.steps or 0})


def _gpus_per_trial(resources: Resources) -> float:
    if resources.gpus_per_trial == "auto":
        return 0.25 if num_gpus() else 0
    return resources.gpus_per_trial


def _with_resources(trainable: Any, resources: Resources) -> Any:
    return tune.with_resources(trainable, {"CPU": resources.cpus_per_trial, "GPU": _gpus_per_trial(resources)})


class _TrialCounter(tune.Callback):  # type: ignore[misc]
    """Callback that counts an experiment's trials by state, and reports each trial that ends. Tune calls it in the driver.

    The receivers are class attributes, because Tune pickles its callbacks with the experiment and restores them.
    """

    count: ClassVar[Count | None] = None
    ended: ClassVar[Callable[[int, "_LastReport"], None] | None] = None
    """Receives the index of a listed trial, and its last report."""
    _counted_at_s = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._counted_at_s > _COUNT_S:
            self.on_experiment_end(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _TrialCounter.ended is not None and "index" in trial.config:
            _TrialCounter.ended(trial.config["index"], _LastReport.model_validate(trial.last_result or {}))

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if _TrialCounter.count is not None:
            _TrialCounter.count(Counter(_STATES.get(trial.status, "failed") for trial in trials))
        self._counted_at_s = time.monotonic()


def _run_config(name: str, setup: TrialSetup, retries: int) -> tune.RunConfig:
    return tune.RunConfig(
        name=name,
        storage_path=ray_folder(Storage(setup.root).child("finetune")),
        failure_config=tune.FailureConfig(max_failures=retries),
        callbacks=[_TrialCounter()],
        verbose=0,
    )


def _scheduler_of(setup: TrialSetup, trial: Trial) -> Any:
    """Return a new scheduler for a trial and those of its group, or None."""
    return _new_scheduler(setup, trial.mode) if _is_scheduled(setup, trial) else None


def _new_scheduler(setup: TrialSetup, mode: Mode) -> Any:
    search = setup.config.search
    options: dict[str, object] = {"time_attr": "training_iteration"}
    if search.scheduler in (*_ASHA, "hyperband"):
        longest = max((setup.config.steps_of(mode), *_listed_values(search.space.get("steps", ()))))
        options["max_t"] = max(1, -(-int(longest) // search.report_steps))
    name = "async_hyperband" if search.scheduler == "asha" else search.scheduler
    try:
        return create_scheduler(name, **{**options, **search.scheduler_options})
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise JobError(f"finetune.search.scheduler {search.scheduler!r}: {error}") from None


def _listed_values(candidates: tuple[float, ...] | Distribution) -> tuple[float, ...]:
    return candidates.named()[1] if isinstance(candidates, Distribution) else candidates


def _new_searcher(search: SearchConfig, seed: int) -> Any:
    # Each algorithm takes the arguments that it knows; there are three names for the seed.
    seeds = {"seed": seed, "random_state": seed, "random_state_seed": seed}
    try:
        return create_searcher(search.searcher, metric="validation_dice", mode="max", **seeds)
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise JobError(f"finetune.search.searcher {search.searcher!r}: {error}") from None


def _tune_space(candidates: tuple[float, ...] | Distribution) -> Any:
    if not isinstance(candidates, Distribution):
        return tune.choice(list(candidates))
    name, bounds = candidates.named()
    return tune.choice(list(bounds)) if name == "choice" else getattr(tune, name)(*bounds)
