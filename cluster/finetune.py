"""Few-shot trials on Ray Tune: every trial a function call that leaves its result on the job's storage.

Tune places trials, gives each its share of CPUs and GPUs, starts one again when its process dies, stops candidates that
are behind (`search.scheduler`) and proposes new ones (`search.searcher`). Schedulers and searchers compare what is alike:
each task and mode is an experiment of its own then.

What a trial found lies on the storage as soon as it ends, and so does that it was stopped. So a killed sweep goes on with the
trials that are missing, from any machine and under any executor, which Tune's own state could not; only what a searcher has
learnt is in that state alone, and its experiment is restored by `Tuner.restore`.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune
from ray.tune.schedulers import create_scheduler
from ray.tune.search import create_searcher

from cluster.pretrain import ray_folder
from cluster.progress import Say, relay
from cluster.session import Credentials, credentials, num_cpus, num_gpus
from p2r.config import Distribution, SearchConfig
from p2r.errors import DataError, JobError, masked_errors
from p2r.evaluate.tasks import load_task
from p2r.fewshot.protocol import Trial, numbers_of, search_trial, space_of
from p2r.fewshot.search import Result
from p2r.fewshot.stored import read_candidates, read_result
from p2r.fewshot.trial import TrialSetup
from p2r.job import Resources
from p2r.logs import Line, counted
from p2r.masking import masked
from p2r.modes import Mode
from p2r.storage import Storage, json_bytes

Count = Callable[[Mapping[str, int]], None]
"""Receives how many trials are in which state: pending, running, paused, done, failed."""
_STATES = {"PENDING": "pending", "RUNNING": "running", "PAUSED": "paused", "TERMINATED": "done", "ERROR": "failed"}
_COUNT_S = 1.0
_ASHA = ("asha", "async_hyperband", "asynchyperband")


def run_trials(
    trials: Sequence[tuple[TrialSetup, Trial]],
    *,
    resources: Resources,
    retries: int,
    say: Say,
    count: Count | None = None,
) -> list[Result]:
    """Run the trials whose results are missing and return all results, in the order of `trials`.

    One that failed after `retries` restarts, or diverged, has its reason in the place of its result.

    Raises:
        DataError: A trial found that what the user gave cannot be used.
    """

    def ended(index: int, metrics: Mapping[str, Any]) -> None:
        setup, trial = trials[index]
        stopped = _stopped(trial, metrics)
        if stopped is not None and not setup.is_done(trial):
            Storage(setup.storage).write_json(setup.stopped_path(trial), stopped)

    _Watching.count, _Watching.ended = count, ended
    missing = [index for index, (setup, trial) in enumerate(trials) if not setup.is_done(trial)]
    others: dict[int, Result] = {}
    if missing:
        say(f"{len(missing)} trials to run, {len(trials) - len(missing)} done already")
        say_each = counted(say, len(missing))
        for number, indices in enumerate(_experiments(trials, missing)):
            with relay(say_each) as queue:
                tuner = tune.Tuner(
                    _placed(
                        tune.with_parameters(_listed, trials=list(trials), queue=queue, given=credentials()), resources
                    ),
                    param_space={"index": tune.grid_search(indices)},
                    # A new process imports torch and MONAI for ten seconds: let trials follow one another in the same one.
                    tune_config=tune.TuneConfig(
                        metric="validation_dice",
                        mode="max",
                        reuse_actors=True,
                        scheduler=_scheduler(trials[indices[0]][0]) if _is_scheduled(*trials[indices[0]]) else None,
                    ),
                    run_config=_run_config(
                        f"finetune-{time.strftime('%Y%m%d-%H%M%S')}-{number}", trials[0][0], retries
                    ),
                )
                for outcome in tuner.fit():
                    index = outcome.config["index"] if outcome.config else None
                    if index is not None and not trials[index][0].is_done(trials[index][1]):
                        others[index] = _without_result(trials[index][1], outcome)
    return [others.get(index) or setup.stored(trial) or _lost(trial) for index, (setup, trial) in enumerate(trials)]


def suggest(
    setup: TrialSetup, mode: Mode, *, resources: Resources, retries: int, say: Say, count: Count | None = None
) -> list[tuple[Trial, Result]]:
    """Run the trials that a search algorithm of Tune proposes, and return them; after a kill, those that are missing.

    Raises:
        JobError: Tune has no such algorithm, or its package is not installed.
        DataError: see `run_trials`.
    """
    _Watching.count, _Watching.ended = count, None
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
        with relay(say) as queue:
            trainable = _placed(
                tune.with_parameters(
                    _proposed, setup=setup, mode=mode, num_labelled=num_labelled, queue=queue, given=credentials()
                ),
                resources,
            )
            name = f"search-{task.name}-{mode}-{digest}"
            where = f"{_run_config(name, setup, retries).storage_path}/{name}"
            if tune.Tuner.can_restore(where):
                say(f"search of {mode} goes on where it was stopped")
                tuner = tune.Tuner.restore(where, trainable=trainable, param_space=space, restart_errored=True)
            else:
                tuner = tune.Tuner(
                    trainable,
                    param_space=space,
                    tune_config=tune.TuneConfig(
                        metric="validation_dice",
                        mode="max",
                        num_samples=search.num_samples,
                        search_alg=_searcher(search, setup.config.seed),
                        scheduler=_scheduler(setup) if search.scheduler != "none" else None,
                        reuse_actors=True,
                    ),
                    run_config=_run_config(name, setup, retries),
                )
            candidates = []
            for outcome in tuner.fit():
                if outcome.config is not None:
                    trial = search_trial(setup.config, task, mode, num_labelled, outcome.config)
                    is_whole = storage.exists(setup.result_path(trial))
                    candidates.append((outcome.config, None if is_whole else _without_result(trial, outcome)))
        if not any(other and "failed" in other for _, other in candidates):
            storage.write_json(done, candidates)
    found = []
    for candidate, other in candidates:
        trial = search_trial(setup.config, task, mode, num_labelled, candidate)
        found.append((trial, other or read_result(storage, setup.result_path(trial))))
    return found


def num_concurrent(num_trials: int, resources: Resources) -> int:
    """Return how many of so many trials the cluster has room for at a time."""
    gpus = _gpus(resources)
    room = [num_cpus() / resources.cpus_per_trial, *([num_gpus() / gpus] if gpus else [])]
    return max(1, min(num_trials, *(int(places) for places in room)))


def _experiments(trials: Sequence[tuple[TrialSetup, Trial]], missing: Sequence[int]) -> list[list[int]]:
    """Split trials into what Tune may compare: with a scheduler one task and mode, else everything at once."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in missing:
        setup, trial = trials[index]
        groups.setdefault((trial.task, trial.mode) if _is_scheduled(setup, trial) else (), []).append(index)
    return list(groups.values())


def _is_scheduled(setup: TrialSetup, trial: Trial) -> bool:
    return setup.config.search.scheduler != "none" and trial.purpose == "search"


def _without_result(trial: Trial, outcome: Any) -> Result:
    """Say of a trial that left no result why: it failed, diverged, or was stopped because it was behind."""
    metrics: Mapping[str, Any] = outcome.metrics or {}
    if "refused" in metrics:
        raise DataError(metrics["refused"])
    stopped = None if outcome.error is not None else _stopped(trial, metrics)
    if stopped is not None:
        return stopped
    reason = metrics.get("failed") or masked(str(outcome.error or "it ended without a result")).strip().splitlines()[-1]
    return {"trial": trial.to_row(), "failed": reason, **({"diverged": True} if "failed" in metrics else {})}


def _stopped(trial: Trial, metrics: Mapping[str, Any]) -> Result | None:
    """What is known of a trial that was stopped, if it reported before it was."""
    if {"failed", "refused"} & metrics.keys() or "step" not in metrics:
        return None
    return {
        "trial": trial.to_row(),
        "stopped_at_step": metrics["step"],
        "validation": {"dice_mean": metrics["validation_dice"]},
        "seconds": metrics.get("time_total_s", 0.0),
    }


def _lost(trial: Trial) -> Result:
    return {"trial": trial.to_row(), "failed": "Ray Tune says nothing of it"}


def _listed(config: dict[str, Any], *, trials: list[tuple[TrialSetup, Trial]], queue: Any, given: Credentials) -> None:
    given.take()
    with masked_errors():
        _trial(*trials[config["index"]], queue=queue)


def _proposed(
    config: dict[str, Any], *, setup: TrialSetup, mode: Mode, num_labelled: int, queue: Any, given: Credentials
) -> None:
    given.take()
    with masked_errors():
        trial = search_trial(setup.config, load_task(Path(setup.task)), mode, num_labelled, config)
        _trial(setup, trial, queue=queue)


def _trial(setup: TrialSetup, trial: Trial, *, queue: Any) -> None:
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
    except TrainingError as error:  # it would diverge again: no restart
        tune.report({"validation_dice": 0.0, "failed": str(error)})
        return
    except InputError as error:
        tune.report({"validation_dice": 0.0, "refused": str(error)})
        return
    dice, row = result["validation"]["dice_mean"], result.get("row")
    text = (
        f"{trial.id} | validation Dice {'none' if dice is None else f'{dice:.3f}'}"
        + (f" | test Dice {row['dice_mean']:.3f}" if row and row["split"] == "test" and row["dice_mean"] else "")
        + f" | {result['seconds']:.0f} s"
    )
    queue.put(Line(text, trial=trial.id, validation_dice=dice, seconds=result["seconds"]))
    tune.report({"validation_dice": dice or 0.0, "step": trial.settings.steps or 0})


def _gpus(resources: Resources) -> float:
    if resources.gpus_per_trial == "auto":
        return 0.25 if num_gpus() else 0
    return resources.gpus_per_trial


def _placed(trainable: Any, resources: Resources) -> Any:
    return tune.with_resources(trainable, {"CPU": resources.cpus_per_trial, "GPU": _gpus(resources)})


class _Watching(tune.Callback):  # type: ignore[misc]
    """Counts the trials of an experiment by state, now and then, and tells of each that ended. Tune calls it in the process that runs
    the experiment.

    Whom it tells belongs to the class: Tune pickles its callbacks with the experiment, and restores them.
    """

    count: ClassVar[Count | None] = None
    ended: ClassVar[Callable[[int, Mapping[str, Any]], None] | None] = None
    """Receives the index of a listed trial, and what it reported last."""
    _counted_at_s = 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._counted_at_s > _COUNT_S:
            self.on_experiment_end(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if _Watching.ended is not None and "index" in trial.config:
            _Watching.ended(trial.config["index"], trial.last_result or {})

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        if _Watching.count is not None:
            _Watching.count(Counter(_STATES.get(trial.status, "failed") for trial in trials))
        self._counted_at_s = time.monotonic()


def _run_config(name: str, setup: TrialSetup, retries: int) -> tune.RunConfig:
    return tune.RunConfig(
        name=name,
        storage_path=ray_folder(Storage(setup.root).child("finetune")),
        failure_config=tune.FailureConfig(max_failures=retries),
        callbacks=[_Watching()],
        verbose=0,
    )


def _scheduler(setup: TrialSetup) -> Any:
    search = setup.config.search
    options: dict[str, Any] = {"time_attr": "training_iteration"}
    if search.scheduler in (*_ASHA, "hyperband"):
        longest = max((setup.config.steps, *_values(search.space.get("steps", ()))))
        options["max_t"] = max(1, -(-int(longest) // search.report_steps))
    name = "async_hyperband" if search.scheduler == "asha" else search.scheduler
    try:
        return create_scheduler(name, **{**options, **search.scheduler_options})
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise JobError(f"finetune.search.scheduler {search.scheduler!r}: {error}") from None


def _values(candidates: tuple[float, ...] | Distribution) -> tuple[float, ...]:
    return candidates.named()[1] if isinstance(candidates, Distribution) else candidates


def _searcher(search: SearchConfig, seed: int) -> Any:
    # Each takes what it knows of this; a seed has three names.
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
