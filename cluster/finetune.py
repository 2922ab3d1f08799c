"""Few-shot trials on Ray Tune: every trial a function call that leaves its result on the job's storage.

Tune places trials, gives each its share of CPUs and GPUs, and starts one again when its process dies. What a trial found is
read from the storage, so a killed sweep goes on with the trials that are missing.
"""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import tune

from cluster.pretrain import ray_folder
from cluster.progress import Say, relay
from cluster.session import num_gpus
from p2r.engine.finetune import TrialSetup
from p2r.errors import TrainingError
from p2r.evaluate.protocol import Trial
from p2r.job import Resources
from p2r.storage import Storage


def run_trials(
    trials: Sequence[tuple[TrialSetup, Trial]], *, resources: Resources, retries: int, say: Say
) -> list[dict[str, Any]]:
    """Run the trials whose results are missing and return all results, in the order of `trials`.

    Raises:
        TrainingError: naming every trial that failed after `retries` restarts; the others are kept.
    """
    storages = [Storage(setup.storage) for setup, _ in trials]
    paths = [setup.result_path(trial) for setup, trial in trials]
    missing = [index for index in range(len(trials)) if not storages[index].exists(paths[index])]
    if missing:
        gpus = (0.25 if num_gpus() else 0) if resources.gpus_per_trial == "auto" else resources.gpus_per_trial
        say(f"finetune | {len(missing)} trials to run, {len(trials) - len(missing)} done already")
        with relay(say) as queue:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(_trial, trials=list(trials), queue=queue),
                    {"CPU": resources.cpus_per_trial, "GPU": gpus},
                ),
                param_space={"index": tune.grid_search(missing)},
                # A new process imports torch and MONAI for ten seconds: let trials follow one another in the same one.
                tune_config=tune.TuneConfig(metric="validation_dice", mode="max", reuse_actors=True),
                run_config=tune.RunConfig(
                    name=f"finetune-{time.strftime('%Y%m%d-%H%M%S')}",
                    storage_path=ray_folder(Storage(storages[0].url.rsplit("/", 1)[0])),
                    failure_config=tune.FailureConfig(max_failures=retries),
                    verbose=0,
                ),
            )
            outcomes = tuner.fit()
        failed = {
            missing[number]: str(outcome.error) for number, outcome in enumerate(outcomes) if outcome.error is not None
        }
        if failed:
            lines = "\n".join(
                f"  {trials[index][1].id}: {message.strip().splitlines()[-1]}" for index, message in failed.items()
            )
            raise TrainingError(
                f"{len(failed)} of {len(trials)} trials failed:\n{lines}\nThe others are kept: run the job again."
            )
    return [storage.read_json(path) for storage, path in zip(storages, paths, strict=True)]


def _trial(config: dict[str, Any], *, trials: list[tuple[TrialSetup, Trial]], queue: Any) -> None:
    import torch

    from p2r.engine.finetune import run_trial

    setup, trial = trials[config["index"]]
    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
    began = time.monotonic()
    result = run_trial(setup, trial, device=device, say=lambda line: queue.put(f"finetune | {line}"))
    validation, row = result["validation"]["dice_mean"], result.get("row")
    queue.put(
        f"finetune | {trial.id} | validation Dice {validation:.3f}"
        + (f" | test Dice {row['dice_mean']:.3f}" if row and row["split"] == "test" else "")
        + f" | {time.monotonic() - began:.0f} s"
    )
    tune.report({"validation_dice": validation})
