"""Properties that all trials of one task share, and the names of a trial's files, which depend on all of its recipe."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    """What all trials of one task share; plain values, so that it travels to another machine."""

    config: FinetuneConfig
    task: str
    """Path of the task's YAML."""
    backbone: str
    """URL of the published backbone."""
    backbone_sha256: str
    """Its pin, the digest of its manifest: a trial that finds another one under the URL refuses."""
    architecture_sha256: str
    """Digest of its network's shape and its way to prepare a scan: all that a trial from scratch takes of it."""
    storage: str
    """URL of `<storage>/finetune/<task>`."""
    root: str
    """URL of `<storage>`."""
    is_transductive: bool = False
    """Whether validation or test patients of the task are known to be in the backbone's corpus."""
    data_sha256: str = ""
    """Digest of the files of train and validation patients."""
    test_sha256: str = ""
    """Digest of the files of test patients: part of what their figures depend on, and of nothing else."""

    def preparation(self, backbone: Backbone) -> Preparation:
        """What the trials' models do to a scan: the backbone's way, how much of a plane they read, and what the task states."""
        return preparation_for(read_task_config(Path(self.task)), self.config, backbone.preparation)

    def recipe_sha256(self, trial: Trial, *, score_on: Literal["test", "validation"] | None = None) -> str:
        """Return a digest of everything that the trial's result depends on, if scored on this split; None: the job's."""
        score_on = score_on or self.config.score_on
        config = self.config.model_dump(
            mode="json",
            include={"seed", "batch_size", "views", "planes", "nsd_tolerance_mm", "largest_component"},
            exclude={"views": {"shown_fraction"}},  # of pretraining only
        )
        if MODES[trial.mode].unlabelled == "pseudo_labels":
            config |= self.config.model_dump(mode="json", include={"strong_intensity"})
        if self.config.compile:
            config["compile"] = True
        if MODES[trial.mode].trains == "head":
            config["probe_augmentation"] = self.config.probe_augmentation
        recipe: dict[str, Any] = {
            "config": config,
            "trial": trial.to_recipe(),
            "task": task_sha256(Path(self.task)),
            "data": self.data_sha256,
            "backbone": self._backbone_of(trial),
        }
        if trial.purpose == "final":
            recipe["score_on"] = score_on
            if score_on == "test":
                recipe["test"] = self.test_sha256
        if self.config.allow_transductive:
            recipe["transductive"] = True
        return hashlib.sha256(json_bytes(recipe)).hexdigest()

    def _backbone_of(self, trial: Trial) -> str:
        """Return the digest of what the trial takes of the backbone."""
        # Whether a row is labelled as transductive hangs on the backbone's corpus, not on its shape alone.
        if MODES[trial.mode].is_from_scratch and not self.config.allow_transductive:
            return self.architecture_sha256
        return self.backbone_sha256

    def result_path(self, trial: Trial) -> str:
        """Where the trial's result lies below `storage`: its name holds a digest of everything that it depends on."""
        return f"trials/{trial.id}-{self.recipe_sha256(trial)[:12]}.json"

    def state_path(self, trial: Trial) -> str:
        """Where the trial's training state is stored below `storage` until it is done."""
        return f"unfinished/{trial.id}-{self.recipe_sha256(trial)[:12]}.safetensors"

    def stopped_path(self, trial: Trial) -> str:
        """Where it is noted below `storage` that a scheduler stopped the trial: that depends on its rivals, too."""
        of = {"recipe": self.recipe_sha256(trial), "search": self.config.search.model_dump(mode="json")}
        return f"searches/{trial.id}-{hashlib.sha256(json_bytes(of)).hexdigest()[:12]}.json"

    def is_done(self, trial: Trial) -> bool:
        """Whether the storage has the trial's result, or knows that it was stopped."""
        return self._stored_path(trial) is not None

    def is_begun(self, trial: Trial) -> bool:
        """Whether the storage has the training state of the trial, which an earlier run left."""
        return Storage(self.storage).exists(self.state_path(trial))

    def stored(self, trial: Trial) -> TrialResult | None:
        """Return the trial's result on the storage, or the step at which it was stopped; None: neither is stored."""
        path = self._stored_path(trial)
        return None if path is None else read_result(Storage(self.storage), path)

    def finished(self, trial: Trial) -> TrialResult | None:
        """Return the result of the trial, if the storage has it."""
        path = self.result_path(trial)
        return read_result(Storage(self.storage), path) if Storage(self.storage).exists(path) else None

    def scored_on_validation(self, trial: Trial) -> TrialResult | None:
        """Return the result of the same training with scores of validation patients; None if the storage has none.

        A recipe is chosen on validation patients. To evaluate it on test patients then needs no second training.
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


def preparation_for(task: TaskConfig, config: FinetuneConfig, of_backbone: Preparation) -> Preparation:
    """Return what models of a task do to a scan: the backbone's way, but for how much they read of it, and what the task states."""
    return task.preparation(of_backbone.model_copy(update={"planes": config.planes}))
