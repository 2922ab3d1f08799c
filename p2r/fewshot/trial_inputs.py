"""The inputs of a few-shot trial: task, backbone, preparation, and the loaders of its labelled scans and validation cases."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from p2r.backbone import ArtefactConfig, Backbone, load_backbone
from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.errors import DataError
from p2r.evaluate.inference import size_read
from p2r.evaluate.prepared import prepared_scan
from p2r.evaluate.tasks import LabelledScan, Task, TaskImages, load_task
from p2r.fewshot.leaks import Known
from p2r.fewshot.others import load_other
from p2r.fewshot.paper_compat import Crop, cropped, split_by_slice
from p2r.fewshot.protocol import Trial
from p2r.fewshot.scoring import Case, case_of_crop, cases_of
from p2r.fewshot.setup import TrialSetup
from p2r.model.backbones import build_backbone
from p2r.model.contrasts import adapt_contrasts, config_for
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.randomness import keyed_generator


@dataclass(frozen=True)
class TrialInputs:
    """Inputs of training and scoring of a trial."""

    setup: TrialSetup
    trial: Trial
    task: Task
    backbone: Backbone
    preparation: Preparation
    known: Known
    """Held-out patients found in the backbone's corpora."""
    training: Callable[[int | None], list[LabelledScan]]
    """Function: image size (None: whole images) -> the labelled scans."""
    validation: Callable[[], Iterable[Case]]
    """Function -> the validation cases."""
    device: str

    @property
    def config(self) -> FinetuneConfig:
        """The job's section `finetune`."""
        return self.setup.config

    @property
    def reports_test(self) -> bool:
        """True if the row has the scores of the test patients."""
        return self.trial.purpose == "final" and self.config.score_on == "test"

    @property
    def reports_validation(self) -> bool:
        """True if the row has the scores of the validation patients."""
        return self.trial.purpose == "final" and self.config.score_on == "validation"

    @property
    def unlabelled_scans(self) -> tuple[TaskImages, ...]:
        """Scans of train patients that were not drawn, and scans without a label map."""
        others = tuple(sorted(set(self.task.subjects["train"]) - set(self.trial.subjects)))
        return (*self.task.scans_of(others), *self.task.unlabelled)


def prepare_trial(setup: TrialSetup, trial: Trial, *, device: str) -> TrialInputs:
    """Load task and backbone of a trial; scans are read when training and scoring need them."""
    task = load_task(Path(setup.task))
    is_other = MODES[trial.mode].weights == "other"
    backbone = _load_other(setup) if is_other else load_backbone(setup.backbone, sha256=setup.backbone_sha256)
    preparation = setup.preparation(backbone)
    known = Known(backbone, is_allowed=setup.config.allow_transductive or is_other)
    training, validation = _split_loaders(trial, task, preparation, seed=setup.config.seed)
    return TrialInputs(setup, trial, task, backbone, preparation, known, training, validation, device)


def _load_other(setup: TrialSetup) -> Backbone:
    assert setup.config.other is not None
    found = load_other(setup.config.other)
    if found.manifest.sha256 != setup.other_sha256:
        raise DataError(
            f"finetune.other {setup.config.other.build} built another network than at the start of the job: its weights must be fixed, so "
            "load them, or seed the function"
        )
    return found


def _split_loaders(
    trial: Trial, task: Task, preparation: Preparation, *, seed: int
) -> tuple[Callable[[int | None], list[LabelledScan]], Callable[[], Iterable[Case]]]:
    """Return two functions: image size -> labelled scans, and () -> validation cases."""
    chosen = task.scans_of(trial.subjects)
    if trial.protocol == "leak_free":
        validation = task.scans_of(task.subjects["validation"])
        return (
            lambda size: [prepared_scan(scan, task, preparation, size=size) for scan in chosen],
            lambda: cases_of(validation, task, preparation, is_cropped=False),
        )

    slices = partial(
        slices_of, task, preparation, trial.subjects, seed=seed, num_labelled=trial.num_labelled, draw=trial.draw
    )
    return (
        lambda size: [crop.scan for crop in slices(size=size)[0]],
        lambda: [case_of_crop(crop) for crop in slices(size=size_read(preparation))[1]],
    )


def slices_of(
    task: Task,
    preparation: Preparation,
    subjects: tuple[str, ...],
    *,
    size: int | None,
    seed: int,
    num_labelled: int,
    draw: int,
) -> tuple[list[Crop], list[Crop]]:
    """Return the training slices and the validation slices of labelled patients, for paper_compat.

    Raises:
        DataError: as `split_by_slice`.
    """
    scans = [prepared_scan(scan, task, preparation) for scan in task.scans_of(subjects)]
    crops = [crop for scan in scans for crop in cropped(scan, preparation, size=size)]
    return split_by_slice(crops, keyed_generator(seed, "slices", num_labelled, draw))


def build_segmenter(
    trial: Trial, backbone: Backbone, preparation: Preparation, *, num_classes: int, seed: int
) -> Segmenter:
    """Return the network of a mode, with the backbone's architecture, for the contrasts of the task.

    It has the backbone's weights unless the mode is from scratch. They are frozen for a linear probe.
    """
    torch.manual_seed(seed)
    model = config_for(backbone.config.model, preparation.contrasts)
    classes = {value: str(value) for value in range(1, num_classes)}
    head = ArtefactConfig(model=model, preparation=preparation, classes=classes).head
    if MODES[trial.mode].weights == "other":
        return Segmenter(backbone.network, head())
    network: nn.Module = build_backbone(model, dimensions=preparation.dimensions)
    if not MODES[trial.mode].is_from_scratch:
        weights = adapt_contrasts(
            backbone.network.state_dict(),
            backbone.config.model,
            to=preparation.contrasts,
            dimensions=preparation.dimensions,
        )
        network.load_state_dict(weights)
    if MODES[trial.mode].weights == "frozen":
        network.requires_grad_(False)
    return Segmenter(network, head())


def weights_sha256(inputs: TrialInputs) -> str | None:
    """Return the digest of the backbone that provides the initial weights; None: from scratch."""
    return None if MODES[inputs.trial.mode].is_from_scratch else inputs.backbone.manifest.sha256
