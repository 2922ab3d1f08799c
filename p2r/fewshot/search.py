"""Few-shot segmentation as science: search on validation, freeze, read the test patients once.

    tasks -> search trials -> one choice of settings per mode -> final trials (n x draw x mode) -> rows

How trials are run is the caller's: a loop here, Ray Tune on a cluster. Trials that are done already return at once, so
calling this again after a kill goes on where it stopped. A trial that fails is listed with its reason, and the others go
on; running the job again tries it again.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load

from p2r.backbone import MODEL_FORMAT, ArtefactConfig, Backbone, publish
from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.errors import CheckpointError, DataError, InputError, OutOfTime, TrainingError, error_text
from p2r.evaluate.inference import size_read
from p2r.evaluate.mix_ups import MixUps
from p2r.evaluate.prepared import prepared_scan
from p2r.evaluate.tasks import (
    HELD_OUT,
    LabelledScan,
    Split,
    Task,
    TaskScan,
    check_classes_present,
    check_scans,
    classes_shown,
    load_task,
)
from p2r.fewshot.leaks import Known
from p2r.fewshot.protocol import (
    Settings,
    Trial,
    candidates_of,
    choose_settings,
    draw_of,
    final_trials,
    is_searched,
    numbers_of,
    search_trials,
    settings_of,
    trial_on_all,
)
from p2r.fewshot.stored import read_sweeps
from p2r.fewshot.trial import TrialSetup, run_trial, slices_of
from p2r.files import file_sha256
from p2r.modes import MODES, Mode
from p2r.report.text import for_markdown, one_line
from p2r.storage import Storage, json_bytes

_TRANSDUCTIVE_CARD = """
Its backbone was pretrained on scans of validation or test patients (transductive): the figure is no estimate for others."""
_UNKNOWN_CARD = """
The corpora of its backbone are unknown: validation or test patients may be among them, and the figure is no estimate for others."""
_PAPER_COMPAT_CARD = """
It was trained and judged on scans that were cropped by their labels (paper_compat): it is for comparison with a paper only."""
_OF = {2: "planes", 3: "volumes"}

Say = Callable[[str], None]
Result = dict[str, Any]
"""What `run_trial` returns; or {trial, failed: reason}, and `diverged: True` if it did; or, of one that a scheduler stopped, {trial,
stopped_at_step, validation, seconds}."""


class TrialRunner(Protocol):
    """Who runs trials."""

    def run_trials(self, trials: Sequence[tuple[TrialSetup, Trial]], *, say: Say) -> list[Result]:
        """Run trials in any order; return their results in the given one."""

    def suggest(self, setup: TrialSetup, mode: Mode, *, say: Say) -> list[tuple[Trial, Result]]:
        """Run the trials that `search.searcher` proposes for a mode, and return them."""

    def num_concurrent(self, num_trials: int) -> int:
        """Return how many of so many trials run at a time."""


@dataclass
class FewShot:
    """What the protocol found."""

    results: list[Result]
    """Of the final trials that did not fail."""
    searched: list[dict[str, Any]] = field(default_factory=list)
    """Every trial of the search: task, mode, num_labelled, settings, validation_dice_mean, and what became of it."""
    chosen: list[dict[str, Any]] = field(default_factory=list)
    """The settings of every task and mode, and whether a search chose them."""
    failed: list[dict[str, str]] = field(default_factory=list)
    """Trials without a result, and why."""
    overhead: dict[str, Any] = field(default_factory=dict)
    """What the sweep took beyond its trials' own time."""

    def facts(self) -> dict[str, Any]:
        """Return what a report says beside the rows."""
        return {name: getattr(self, name) for name in ("searched", "chosen", "failed", "overhead")}


def few_shot(setups: Sequence[TrialSetup], *, runner: TrialRunner, say: Say) -> FewShot:
    """Run the whole protocol for every task.

    Args:
        setups: One per task.
        runner: Runs trials.
        say: Receives a line when something was decided.
    """
    found = FewShot([])
    sweep = _Sweep(runner, Storage(setups[0].root).child("finetune"), say)
    tasks = [load_task(Path(setup.task)) for setup in setups]
    searches = [
        (setup, trial)
        for setup, task in zip(setups, tasks, strict=True)
        if setup.config.search.searcher == "grid"
        for trial in search_trials(setup.config, task)
    ]
    outcomes = list(zip(searches, sweep.run(searches), strict=True))
    for setup in setups:
        if setup.config.search.searcher != "grid":
            for mode in setup.config.modes:
                outcomes += [((setup, trial), result) for trial, result in sweep.suggest(setup, mode)]
    finals: list[tuple[TrialSetup, Trial]] = []
    for setup, task in zip(setups, tasks, strict=True):
        of_task = [(trial, result) for (owner, trial), result in outcomes if owner is setup]
        found.searched += [_searched(trial, result) for trial, result in of_task]
        # A candidate that diverged is out, as one that was stopped: it has its line among what was searched.
        found.failed += _failures(result for _, result in of_task if not result.get("diverged"))
        chosen = _choose(setup, task, of_task, found)
        for mode, settings in chosen.items():
            values = ", ".join(f"{name} {value:g}" for name, value in settings.given().items())
            how = "chosen on validation" if is_searched(setup.config, mode) else "the only candidate"
            say(f"{task.name} | {mode} | {how}: {values}")
        finals += [(setup, trial) for trial in final_trials(setup.config, task, chosen)]
    results = sweep.run(finals)
    found.failed += _failures(results)
    found.results = [result for result in results if "failed" not in result]
    found.overhead = sweep.overhead()
    if found.overhead["num_trials"]:
        say(
            "{num_trials} of the trials took {trials_s:.0f} s of their own, {num_concurrent} at a time, the sweep {sweep_s:.0f} s: "
            "overhead {overhead_fraction:.1%}".format(**found.overhead)
        )
    for failure in found.failed:
        say(f"FAILED {failure['trial']}: {failure['reason']}")
    return found


class _Sweep:
    """Runs trials and keeps the time, of this call and of all before: each leaves what it took on the storage."""

    def __init__(self, runner: TrialRunner, storage: Storage, say: Say) -> None:
        self._runner, self._storage, self._say = runner, storage, say

    def run(self, trials: Sequence[tuple[TrialSetup, Trial]]) -> list[Result]:
        # The time of a trial that resumes is not this call's alone.
        missing = [not setup.is_done(trial) and not setup.is_begun(trial) for setup, trial in trials]
        began = time.monotonic()
        results = self._runner.run_trials(trials, say=self._say) if trials else []
        self._count(time.monotonic() - began, [r for r, is_new in zip(results, missing, strict=True) if is_new])
        return results

    def suggest(self, setup: TrialSetup, mode: Mode) -> list[tuple[Trial, Result]]:
        before = set(Storage(setup.storage).list("trials"))
        began = time.monotonic()
        found = self._runner.suggest(setup, mode, say=self._say)
        wall_s = time.monotonic() - began
        new = [(trial, result) for trial, result in found if setup.result_path(trial) not in before]
        # If none has a result now, all is as it was: these were stopped in an earlier call.
        if any(setup.is_done(trial) for trial, _ in new):
            self._count(wall_s, [result for _, result in new])
        return found

    def _count(self, wall_s: float, results: Sequence[Result]) -> None:
        timed = [result["seconds"] for result in results if "seconds" in result]
        if timed:
            took = {
                "num_trials": len(timed),
                "num_concurrent": self._runner.num_concurrent(len(timed)),
                "sweep_s": wall_s,
                "trials_s": math.fsum(timed),
            }
            self._storage.create(f"sweeps/{time.time_ns()}.json", json_bytes(took))

    def overhead(self) -> dict[str, Any]:
        """Return what all sweeps that were not cut short took beyond their trials' own time."""
        took = read_sweeps(self._storage)
        slots_s = math.fsum(one["sweep_s"] * one["num_concurrent"] for one in took)
        trials_s = math.fsum(one["trials_s"] for one in took)
        return {
            "num_trials": sum(one["num_trials"] for one in took),
            "num_concurrent": max((one["num_concurrent"] for one in took), default=0),
            "sweep_s": round(math.fsum(one["sweep_s"] for one in took), 3),
            "trials_s": round(trials_s, 3),
            "overhead_fraction": slots_s / trials_s - 1 if trials_s else None,
        }


def _searched(trial: Trial, result: Result) -> dict[str, Any]:
    return {
        "task": trial.task,
        "mode": trial.mode,
        "protocol": trial.protocol,
        "num_labelled": trial.num_labelled,
        "draw": trial.draw,
        "settings": trial.settings.given(),
        "validation_dice_mean": result.get("validation", {}).get("dice_mean"),
        "seconds": result.get("seconds"),
        "stopped_at_step": result.get("stopped_at_step"),
        "failed": result.get("failed"),
    }


def _failures(results: Any) -> list[dict[str, str]]:
    return [{"trial": result["trial"]["id"], "reason": result["failed"]} for result in results if "failed" in result]


def _choose(
    setup: TrialSetup, task: Task, of_task: Sequence[tuple[Trial, Result]], found: FewShot
) -> dict[Mode, Settings]:
    """Return the settings of every mode that has any left: the best of the search, or the only candidate."""
    config = setup.config
    best = choose_settings(
        (trial, None if "failed" in result or "stopped_at_step" in result else result["validation"]["dice_mean"])
        for trial, result in of_task
    )
    chosen: dict[Mode, Settings] = {}
    for mode in config.modes:
        if not is_searched(config, mode):
            chosen[mode] = settings_of(config, mode, candidates_of(config, mode)[0])
        elif mode in best:
            chosen[mode] = best[mode]
        else:
            reasons = [result["failed"] for trial, result in of_task if trial.mode == mode and "failed" in result]
            reason = "no candidate of its search has a figure" + "".join(f": {one}" for one in reasons[:1])
            missing = final_trials(config, task, {mode: Settings()})  # names hold no settings
            found.failed += [{"trial": trial.id, "reason": reason} for trial in missing]
            continue
        of = "search" if is_searched(config, mode) else "only candidate"
        found.chosen.append({"task": task.name, "mode": mode, "settings": chosen[mode].given(), "by": of})
    return chosen


def attempt(setup: TrialSetup, trial: Trial, *, device: str, retries: int, say: Say, **options: Any) -> Result:
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
            return {"trial": trial.to_row(), "failed": str(error), "diverged": True}
        except Exception as error:
            reason = error_text(error)
            say(f"{trial.id} | attempt {number + 1} of {retries + 1} failed: {reason}")
    return {"trial": trial.to_row(), "failed": reason}


def failure_message(failed: Sequence[dict[str, str]]) -> str:
    """Return what the command line says of trials that failed."""
    names = "\n".join(f"  {failure['trial']}: {failure['reason']}" for failure in failed)
    return (
        f"{len(failed)} trial{'s' * (len(failed) > 1)} failed; the report has the others; run the job again to try again, and change it "
        f"where they diverged:\n{names}"
    )


def check_task(task: Task, backbone: Backbone, setup: TrialSetup) -> TrialSetup:
    """Check, before anything is trained, that the task can be run with this backbone.

    Returns:
        The setup with the digests of the task's files; marked as transductive if a validation or test patient is in the
        backbone's corpus and the job allows it.

    Raises:
        DataError: if the backbone is not for such scans, a validation or test patient is in its corpus, or as `check_data`.
    """
    config = setup.config
    _check_backbone(task, backbone, config)
    known = Known(backbone, is_allowed=config.allow_transductive)
    for split in HELD_OUT:
        for subject in task.subjects[split]:
            known.see_subject(subject, split, task=task)

    def see(scan: LabelledScan, split: Split) -> None:
        if split in HELD_OUT:
            known.see_scan(scan.scan, scan.volume, split)

    check_data(task, config, setup.preparation(backbone), see=see)
    test = set(task.subjects["test"])
    return replace(
        setup,
        is_transductive=setup.is_transductive or known.is_any,
        data_sha256=_files_sha256([scan for scan in task.scans if scan.subject not in test]),
        test_sha256=_files_sha256([scan for scan in task.scans if scan.subject in test]),
    )


def check_data(
    task: Task,
    config: FinetuneConfig,
    preparation: Preparation,
    *,
    see: Callable[[LabelledScan, Split], None] = lambda scan, split: None,
) -> None:
    """Read every scan of a task, and check that the trials that a section asks for can learn from it.

    Args:
        task: From `load_task`.
        config: The section.
        preparation: How the trials' models read a scan.
        see: Called with every scan and its split; it may refuse it.

    Raises:
        DataError: if more patients are asked for than exist, a file breaks the task's rules, two label maps were mixed up, or a
            class is in none of what the labelled patients of a draw show the network.
    """
    draws = _draws(config, task)
    mix_ups = MixUps(task.name)

    def look(scan: LabelledScan, split: Split) -> None:
        see(scan, split)
        if task.config.find_mix_ups:
            mix_ups.see(scan)

    load = partial(prepared_scan, size=size_read(preparation))
    labels_by_subject = check_scans(task, preparation, load=load, see=look)
    mix_ups.check()
    for (num_labelled, draw), subjects in draws.items():
        check_classes_present(labels_by_subject, task, subjects=subjects)
        if config.protocol == "paper_compat":
            training, _ = slices_of(
                task, preparation, subjects, size=None, seed=config.seed, num_labelled=num_labelled, draw=draw
            )
            shown = classes_shown(crop.scan for crop in training)
            check_classes_present(dict.fromkeys(subjects, shown), task, subjects=subjects)


def _check_backbone(task: Task, backbone: Backbone, config: FinetuneConfig) -> None:
    model = backbone.config.model
    if model.in_channels != 1:
        raise DataError(
            f"task {task.name}: a scan has one contrast, the backbone {backbone.manifest['url']} takes {model.in_channels}; "
            "take a backbone of one"
        )
    dimensions = backbone.preparation.dimensions
    asked = task.config.dimensions or (2 if task.config.slice_axis is not None else dimensions)
    if dimensions != asked:
        field = "dimensions" if task.config.dimensions else "slice_axis"
        raise DataError(
            f"task {task.name} is for networks of {_OF[asked]} ({field}), the backbone {backbone.manifest['url']} reads "
            f"{_OF[dimensions]}; take a backbone of {_OF[asked]}, or change the task's {field}"
        )
    if config.protocol == "paper_compat" and dimensions != 2:
        raise DataError(
            f"finetune.protocol paper_compat crops and splits planes, the backbone {backbone.manifest['url']} reads volumes: "
            "take a backbone of planes, or leak_free"
        )


def _draws(config: FinetuneConfig, task: Task) -> dict[tuple[int, int], tuple[str, ...]]:
    """Return the labelled patients of every trial that the protocol may ask for, by their number and draw."""
    finals = final_trials(config, task, dict.fromkeys(config.modes, Settings()))  # whatever they will be trained with
    draws = {(trial.num_labelled, trial.draw): trial.subjects for trial in finals}
    if any(is_searched(config, mode) for mode in config.modes):
        for number in numbers_of(config.search.num_labelled, task):
            draws[number, 0] = draw_of(config, task, num_labelled=number, draw=0)
    return dict(sorted(draws.items()))


def _files_sha256(scans: Sequence[TaskScan]) -> str:
    digest = hashlib.sha256()
    for scan in scans:
        digest.update(f"{scan.key} {scan.subject} {file_sha256(scan.image)} {file_sha256(scan.label)}\n".encode())
    return digest.hexdigest()


def choose_model(config: FinetuneConfig, results: Sequence[Result]) -> Result:
    """Return the result whose model is published: the best validation Dice among the modes that `published_mode` names."""
    fine_tuned = [one for one in results if MODES[one["trial"]["mode"]].weights == "pretrained"]
    candidates = fine_tuned if config.published_mode == "fine_tuned" and fine_tuned else results
    return max(candidates, key=lambda result: result["validation"]["dice_mean"] or 0.0)


def trial_for_publishing(setup: TrialSetup, best: Result) -> Trial | None:
    """Return the trial that trains the best model's mode on all labelled patients; None if the best one is trained on all."""
    task = load_task(Path(setup.task))
    trial = best["trial"]
    if setup.config.protocol != "leak_free" or trial["num_labelled"] == len(set(task.subjects["train"])):
        return None
    return trial_on_all(setup.config, task, trial["mode"], Settings(**trial["settings"]))


def publish_best(setup: TrialSetup, results: Sequence[Result], backbone: Backbone, storage: Storage) -> dict[str, Any]:
    """Publish the model that `choose_model` chooses below `storage` (`<storage>/models`), and return its manifest."""
    best = choose_model(setup.config, results)
    return _publish(setup, best, backbone, storage, why=reason_for(setup.config, best, results))


def reason_for(config: FinetuneConfig, best: Result, results: Sequence[Result]) -> str:
    """Return why `best` is published, for its card: its validation Dice, and the models that it was compared with."""
    num = sum(MODES[one["trial"]["mode"]].weights == MODES[best["trial"]["mode"]].weights for one in results)
    is_among_fine_tuned = config.published_mode == "fine_tuned" and num < len(results)
    among = f"{num} fine-tuned models" if is_among_fine_tuned else f"{len(results)} models"
    return f"the best validation Dice ({_dice_of(best):.3f}) of {among}"


def publish_on_all(setup: TrialSetup, result: Result, backbone: Backbone, storage: Storage) -> dict[str, Any]:
    """Publish the model that learned from all labelled patients as `<task>/all`, and return its manifest.

    What is published never changes: where `all` is another model already, this one is `all-<digest>`.
    """
    why = f"all labelled patients of the train split; validation Dice {_dice_of(result):.3f}, test patients not read"
    return _publish(setup, result, backbone, storage, why=why, name="all")


def publish_other_draws(
    setup: TrialSetup, results: Sequence[Result], backbone: Backbone, storage: Storage
) -> dict[int, dict[str, Any]]:
    """Publish the other draws of the best model's mode and number of labelled patients; return their manifests by draw."""
    best, published = choose_model(setup.config, results)["trial"], {}
    for one in results:
        trial = one["trial"]
        if (trial["mode"], trial["num_labelled"]) == (best["mode"], best["num_labelled"]) and trial["draw"] != best[
            "draw"
        ]:
            why = f"draw {trial['draw']}, published for ensembles; validation Dice {_dice_of(one):.3f}"
            published[trial["draw"]] = _publish(setup, one, backbone, storage, why=why)
    return published


def _dice_of(result: Result) -> float:
    return float(result["validation"]["dice_mean"] or 0.0)


def _publish(
    setup: TrialSetup, best: Result, backbone: Backbone, storage: Storage, *, why: str, name: str | None = None
) -> dict[str, Any]:
    task = load_task(Path(setup.task))
    trial = best["trial"]
    weights = load(Storage(setup.storage).read_bytes(best["weights"]))
    # From scratch, a model has the backbone's shape and nothing of its weights or corpora.
    is_scratch = MODES[trial["mode"]].is_from_scratch
    licences = [task.config.licence] if is_scratch else [backbone.manifest["licence"], task.config.licence]
    licence = " AND ".join(dict.fromkeys(licences))
    names, number = ", ".join(map(for_markdown, trial["subjects"])), trial["num_labelled"]
    patients = f"{number} labelled patient{'s' * (number > 1)} ({names})"
    trial_is_transductive = bool(best["row"].get("transductive"))
    classes = ", ".join(f"{value} {for_markdown(name)}" for value, name in task.config.classes.items())
    seen = _UNKNOWN_CARD if best["row"].get("corpora") == "unknown" else _TRANSDUCTIVE_CARD
    warnings = seen * trial_is_transductive + _PAPER_COMPAT_CARD * (trial["protocol"] == "paper_compat")
    about = f"""# {for_markdown(task.config.title)}

Segments {classes} (0: background). Mode {trial["mode"]} ({MODES[trial["mode"]].title}) with {patients}: {why}.
Not a medical device.{warnings}

    p2r predict {one_line(storage.at(task.config.name))}/%s scan.nii.gz -o segmentation.nii.gz

Licence of the weights: {for_markdown(licence)}. {for_markdown(task.config.citation)}
"""
    config = ArtefactConfig(
        model=backbone.config.model,
        preparation=setup.preparation(backbone),
        classes=task.config.classes,
        largest_component=setup.config.largest_component,
        num_prototypes=tuple(best["num_prototypes"]) if "num_prototypes" in best else (),
    )
    facts = {
        "task": task.config.name,
        "licence": licence,
        "trial": trial,
        "validation": best["validation"],
        "transductive": trial_is_transductive,
        "backbone_sha256": best["row"]["backbone_sha256"],
        "corpora": [] if is_scratch else backbone.manifest["corpora"],
    }
    # What is published never changes: a model of which anything else is said, such as a corrected licence, is another version.
    said = hashlib.sha256(json_bytes([about, facts, config.model_dump(mode="json")])).hexdigest()
    own_version = f"{Path(best['weights']).stem}-{said[:12]}"

    def publish_as(version: str) -> dict[str, Any]:
        where = storage.child(f"{task.config.name}/{version}")
        card = about.replace("%s", version)
        return publish(where, format=MODEL_FORMAT, weights=weights, config=config, card=card, facts=facts)

    if name is None:
        return publish_as(own_version)
    try:
        return publish_as(name)
    except CheckpointError:  # another model is published there, or this one cannot be: then this fails, too
        return publish_as(f"{name}-{said[:12]}")
