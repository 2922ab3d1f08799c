"""Labelled scans before any training -> features of a frozen backbone, a segmenter by class prototypes, rules of plausibility."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import p2r.model
from p2r.backbone import ArtefactConfig
from p2r.config import ModelConfig
from p2r.data.preprocess import Preparation
from p2r.evaluate.inference import features_of_images
from p2r.evaluate.prepared import Arrays, Facts, cached, digest_code
from p2r.evaluate.tasks import LabelledScan
from p2r.fewshot.images import labelled_images
from p2r.fewshot.plausibility import Plausibility, frames_of_scans, learn_plausibility
from p2r.fewshot.protocol import Trial
from p2r.fewshot.prototypes import class_prototypes
from p2r.model.pix2rep import Segmenter
from p2r.randomness import keyed_generator

FeaturesOfScan = tuple[Tensor, Tensor, Tensor]
"""Features (P, F, *s), labels (P, *S) and inside (P, *S) bool of one scan."""


def frozen_features(
    scans: Sequence[LabelledScan],
    network: nn.Module,
    trial: Trial,
    *,
    backbone_sha256: str,
    preparation: Preparation,
    device: str,
) -> list[FeaturesOfScan]:
    """Return features, labels and inside of every scan; features are cached on the local disk for all trials of the backbone."""
    found = []
    for scan in scans:

        def make(scan: LabelledScan = scan) -> tuple[Arrays, Facts]:
            features = features_of_images(network, scan.planes, preparation=preparation, device=device)
            return {"features": features.numpy()}, {}

        if trial.protocol == "paper_compat":  # cropped by the label, and split: only for this trial
            features = _as_tensor(*make())
        else:
            key = {
                "images": hashlib.sha256(scan.planes.images.contiguous().numpy().data).hexdigest(),
                "preparation": preparation.model_dump(mode="json"),
                "backbone": backbone_sha256,
                "device": device,
                "code": _network_code_sha256(),
            }
            features = cached("features", key, make, use=_as_tensor)
        found.append((features, scan.label_planes, scan.planes.inside))
    return found


@functools.cache
def _network_code_sha256() -> str:
    """Return the digest of the code of the networks: a change of the code invalidates cached features."""
    return digest_code(sorted(Path(p2r.model.__file__).parent.glob("*.py")))


def _as_tensor(arrays: Arrays, facts: Facts) -> Tensor:
    return torch.from_numpy(arrays["features"])


def segmenter_by_prototypes(
    network: nn.Module,
    scans: Sequence[FeaturesOfScan],
    trial: Trial,
    *,
    model: ModelConfig,
    preparation: Preparation,
    num_classes: int,
    seed: int,
) -> Segmenter:
    """Return a segmenter with class prototypes from labelled features, on the network's device."""
    settings = trial.settings
    centre, found = class_prototypes(
        scans,
        num_classes=num_classes,
        prototypes_per_class=settings.prototypes_per_class or 1,
        background_prototypes=settings.background_prototypes or 1,
        num_clusterings=settings.prototype_clusterings or 1,
        generator=keyed_generator(seed, "prototypes", trial.num_labelled, trial.draw),
    )
    head = ArtefactConfig(
        model=model,
        preparation=preparation,
        num_prototypes=tuple(len(prototypes) for prototypes in found),
        prototype_smoothing_pixels=settings.prototype_smoothing_pixels or 0.0,
        prototypes_are_centred=True,
        prototype_clusterings=settings.prototype_clusterings or 1,
    ).head()
    head.load_state_dict({"centre": centre, "prototypes": torch.cat(found)})
    return Segmenter(network, head.to(next(network.parameters()).device)).eval()


def plausibility_of(
    labelled: Sequence[LabelledScan], trial: Trial, *, num_classes: int, preparation: Preparation
) -> Plausibility:
    """Learn the organs' size and place from labelled scans, with the trial's tolerances."""
    labels = labelled_images(labelled).labels
    assert labels is not None
    return learn_plausibility(
        labels,
        frames_of_scans([scan.planes for scan in labelled]),
        num_classes=num_classes,
        size_factor=trial.settings.plausible_size_factor or 1.0,
        margin_pixels=(trial.settings.plausible_margin_mm or 0.0) / preparation.spacing_mm,
    )
