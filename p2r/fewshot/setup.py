"""Properties shared by all trials of a task, and the names of a trial's files, which contain a digest of its recipe."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2r.backbone import Backbone
from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.evaluate.tasks import TaskConfig, read_task_config, task_sha256
from p2r.fewshot.protocol import Trial
from p2r.fewshot.results import TrialResult
from p2r.fewshot.stored import read_result
from p2r.modes import MODES
from p2r.storage import Storage, json_bytes


@dataclass(frozen=True)
class TrialSetup:
    """Properties shared by all trials of one task; plain values that can be sent to another machine."""

    config: FinetuneConfig
    task: str
    """Path of the task's YAML."""
    backbone: str
    """URL of the published backbone."""
    backbone_sha256: str
    """Digest of the backbone's manifest. A trial refuses a URL whose manifest has another digest."""
    architecture_sha256: str
    """Digest of the backbone's architecture and preparation, the only parts that a trial from scratch uses."""
    storage: str
    """URL of `<storage>/finetune/<task>`."""
    root: str
    """URL of `<storage>`."""
    is_transductive: bool = False
    """True if validation or test patients of the task are known to be in the backbone's corpus."""
    data_sha256: str = ""
    """Digest of the files of train and validation patients."""
    test_sha256: str = ""
    """Digest of the files of test patients; part of the recipe of trials that report test patients."""

    other_sha256: str = ""
    """Digest of the network of `config.other`; a trial refuses one with another digest."""

    def preparation(self, backbone: Backbone) -> Preparation:
        """Return the preparation of scans for the trials' models; see `preparation_for`."""
        return preparation_for(read_task_config(Path(self.task)), self.config, backbone.preparation)

    def recipe_sha256(self, trial: Trial, *, score_on: Literal["test", "validation"] | None = None) -> str:
        """Return a digest of everything that the trial's result depends on, if scored on this split; None: the job's."""
        score_on = score_on or self.config.score_on
        config = self.config.model_dump(
            mode="json",
            include={
                "seed",
                "batch_size",
                "foreground_share",
                "views",
                "planes",
                "spacing_mm",
                "image_size",
                "nsd_tolerance_mm",
                "largest_component",
            },
            exclude={"views": {"shown_fraction", "frames_apart"}},  # only for pretraining
        )
        if MODES[trial.mode].unlabelled == "pseudo_labels":
            config |= self.config.model_dump(mode="json", include={"strong_intensity"})
        if self.config.contrasts is not None:
            config["contrasts"] = self.config.contrasts
        if self.config.compile:
            config["compile"] = True
        if MODES[trial.mode].trains == "head":
            config["probe_augmentation"] = self.config.probe_augmentation
        recipe: dict[str, object] = {
            "config": config,
            "trial": trial.to_recipe(),
            "task": task_sha256(Path(self.task)),
            "data": self.data_sha256,
            "backbone": self._backbone_digest(trial),
        }
        if trial.purpose == "final":
            recipe["score_on"] = score_on
            if self.config.contrast_subsets is not None:
                recipe["contrast_subsets"] = self.config.contrast_subsets
            if score_on == "test":
                recipe["test"] = self.test_sha256
        if self.config.allow_transductive:
            recipe["transductive"] = True
        return hashlib.sha256(json_bytes(recipe)).hexdigest()

    def _backbone_digest(self, trial: Trial) -> str:
        """Return the digest of the parts of the backbone that the trial uses."""
        if MODES[trial.mode].weights == "other":
            return self.other_sha256
        # The label transductive of a row depends on the backbone's corpus, so not only on its architecture.
        if MODES[trial.mode].is_from_scratch and not self.config.allow_transductive:
            return self.architecture_sha256
        return self.backbone_sha256

    def result_path(self, trial: Trial) -> str:
        """Path of the trial's result below `storage`; its name contains the digest of the recipe."""
        return f"trials/{trial.id}-{self.recipe_sha256(trial)[:12]}.json"

    def state_path(self, trial: Trial) -> str:
        """Path of the trial's training state below `storage`, until the trial is done."""
        return f"unfinished/{trial.id}-{self.recipe_sha256(trial)[:12]}.safetensors"

    def stopped_path(self, trial: Trial) -> str:
        """Path below `storage` of the result of a trial that a scheduler stopped, which also depends on the search section."""
        inputs: dict[str, object] = {
            "recipe": self.recipe_sha256(trial),
            "search": self.config.search.model_dump(mode="json"),
        }
        if (steps := self.config.steps_of(trial.mode)) != self.config.steps:
            inputs["steps"] = steps  # schedulers once stopped such trials too early
        return f"searches/{trial.id}-{hashlib.sha256(json_bytes(inputs)).hexdigest()[:12]}.json"

    def is_done(self, trial: Trial) -> bool:
        """Return whether the storage has the trial's result, finished or stopped."""
        return self._stored_path(trial) is not None

    def is_begun(self, trial: Trial) -> bool:
        """Return whether the storage has a training state of the trial from an earlier run."""
        return Storage(self.storage).exists(self.state_path(trial))

    def stored(self, trial: Trial) -> TrialResult | None:
        """Return the trial's stored result, finished or stopped; None if there is none."""
        path = self._stored_path(trial)
        return None if path is None else read_result(Storage(self.storage), path)

    def finished(self, trial: Trial) -> TrialResult | None:
        """Return the trial's stored result if it finished; None otherwise."""
        path = self.result_path(trial)
        return read_result(Storage(self.storage), path) if Storage(self.storage).exists(path) else None

    def scored_on_validation(self, trial: Trial) -> TrialResult | None:
        """Return the stored result of the same training with validation scores; None if there is none.

        A recipe chosen on validation patients can then be evaluated on test patients without a second training.
        """
        if trial.purpose != "final" or self.config.score_on == "validation":
            return None
        path = f"trials/{trial.id}-{self.recipe_sha256(trial, score_on='validation')[:12]}.json"
        return read_result(Storage(self.storage), path) if Storage(self.storage).exists(path) else None

    def _stored_path(self, trial: Trial) -> str | None:
        storage = Storage(self.storage)
        return next(
            (path for path in (self.result_path(trial), self.stopped_path(trial)) if storage.exists(path)), None
        )


def contrasts_read(task: TaskConfig, config: FinetuneConfig) -> tuple[str, ...] | None:
    """Return the contrasts that a task's models read; None: one without a name."""
    return config.contrasts or task.contrasts


def subsets_of(task: TaskConfig, config: FinetuneConfig) -> list[tuple[str, ...]]:
    """Return the subsets of contrasts that a task's models are scored with; another task of the job may have other contrasts."""
    read = contrasts_read(task, config) or ()
    return [subset for subset in config.contrast_subsets or () if set(subset) <= set(read) and len(read) > 1]


def preparation_for(task: TaskConfig, config: FinetuneConfig, of_backbone: Preparation) -> Preparation:
    """Return the preparation of scans for a task's models: the backbone's, with the values of the task and the section."""
    preparation = task.preparation(of_backbone.model_copy(update={"planes": config.planes}))
    stated = {"spacing_mm": config.spacing_mm, "image_size": config.image_size}
    given = {name: value for name, value in stated.items() if value is not None}
    return preparation.model_copy(update={**given, "contrasts": contrasts_read(task, config)})
