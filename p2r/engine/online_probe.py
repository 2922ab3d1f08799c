"""Online probe: a backbone in training x a small labelled task -> one Dice within seconds, which reveals a collapse early.

A few train patients of the task give labelled pixels, and a few validation patients are segmented; test patients are never
opened. The probe is ridge regression of the classes on standardised features, in closed form. Without learning rate, steps or
seed, its result changes only with the features. Classes are weighted by the square root of their number of pixels. Unweighted,
every model calls a small organ background; with equal weights, it calls background the organ.

The Dice is for monitoring one run. Planes are read about their centre on the network's grid, and Dice is pooled over the pixels
of all validation patients. It is not a result to report, and not comparable with fine-tuning.

Training is unaffected: weights are copied into the probe's own network, and no random generator of training is used.

Letters: P images, *S their sides, F features, K classes with the background, n pixels.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from p2r.config import PretrainConfig
from p2r.contrasts import describe
from p2r.data.preprocess import Frames, Planes, Preparation
from p2r.errors import DataError
from p2r.evaluate.inference import features_of_images
from p2r.evaluate.prepared import prepared_scan
from p2r.evaluate.sampling import draw_subjects
from p2r.evaluate.tasks import LabelledScan, Task, TaskScan, check_classes_present, classes_shown, load_task
from p2r.model.backbones import build_backbone
from p2r.model.contrasts import adapt_contrasts, config_for, missing_contrasts

_IMAGES_AT_ONCE = 4
_RIDGE = 1e-3
"""Ridge added to the features' covariance, whose diagonal is 1: dead or duplicated features do not matter."""


class OnlineProbe:
    """The scans of a probe, read once, and a network to load weights into.

    Args:
        config: Configuration of the run, with a section `probe`.
        device: Device of the network.

    Raises:
        DataError: The task breaks a rule, has too few patients, or the labelled images lack a class.
        RefusedScan: A file cannot be used.
    """

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        assert config.probe is not None
        probe, image = config.probe, config.image
        task = load_task(Path(probe.task))
        own_way = Preparation(
            dimensions=image.dimensions,
            intensity_percentiles=image.intensity_percentiles,
            spacing_mm=image.spacing_mm,
            image_size=image.size,
            planes="centre",
        )
        self._preparation = task.config.preparation(own_way)
        self._device, self._num_classes = device, task.num_classes
        self._model, contrasts = config.model, self._preparation.contrasts
        if others := missing_contrasts(config.model.contrasts, contrasts):
            raise DataError(
                f"pretrain.probe: task {task.name} wants the contrast {', '.join(others)}, pretrain.model.contrasts are "
                f"{describe(config.model.contrasts)}; use a task of these contrasts"
            )
        train = draw_subjects(task.subjects["train"], num_labelled=probe.num_labelled, draw=0, seed=probe.seed)
        others = task.subjects["validation"]
        num_validation = min(probe.num_validation, len(others))
        validation = draw_subjects(others, num_labelled=num_validation, draw=0, seed=probe.seed)
        self._train, self._validation = (
            [self._read_scan(scan, task, probe.planes_per_scan) for scan in task.scans_of(subjects)]
            for subjects in (train, validation)
        )
        check_classes_present(dict.fromkeys(train, classes_shown(self._train)), task, subjects=train)
        with torch.random.fork_rng(devices=[]):
            network = build_backbone(config_for(config.model, contrasts), dimensions=image.dimensions)
        self._network = network.to(device).requires_grad_(False)

    def _read_scan(self, scan: TaskScan, task: Task, most: int) -> LabelledScan:
        """Read a scan, and keep at most `most` of its planes, evenly spaced."""
        loaded = prepared_scan(scan, task, self._preparation, size=self._preparation.image_size)
        chosen = _even_indices(len(loaded.label_planes), most)
        return replace(loaded, planes=_select_images(loaded.planes, chosen), label_planes=loaded.label_planes[chosen])

    def dice(self, weights: Mapping[str, Tensor]) -> float:
        """Return the mean Dice over classes, pooled over the pixels of all validation images.

        Args:
            weights: The backbone's weights, under the names of its state, in any precision.
        """
        contrasts, dimensions = self._preparation.contrasts, self._preparation.dimensions
        self._network.load_state_dict(adapt_contrasts(weights, self._model, to=contrasts, dimensions=dimensions))
        labelled = (pixels for scan in self._train for pixels in self._pixel_features(scan))
        readout = fit_readout(labelled, num_classes=self._num_classes)
        both, either = torch.zeros(2, self._num_classes, dtype=torch.int64)
        for scan in self._validation:
            for features, labels in self._pixel_features(scan):
                found = readout(features)
                both += torch.bincount(labels[found == labels], minlength=self._num_classes)
                for values in (found, labels):
                    either += torch.bincount(values, minlength=self._num_classes)
        of_classes = [2 * int(b) / int(e) for b, e in zip(both[1:], either[1:], strict=True) if e]
        return sum(of_classes) / len(of_classes) if of_classes else 0.0

    def _pixel_features(self, scan: LabelledScan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features (n, F) and labels (n,) of the pixels inside the scan, for a few images at a time."""
        for start in range(0, len(scan.label_planes), _IMAGES_AT_ONCE):
            chosen = torch.arange(start, min(start + _IMAGES_AT_ONCE, len(scan.label_planes)))
            images, labels = _select_images(scan.planes, chosen), scan.label_planes[chosen]
            maps = features_of_images(self._network, images, preparation=self._preparation, device=self._device)
            if maps.shape[2:] != labels.shape[1:]:
                mode = "bilinear" if labels.ndim == 3 else "trilinear"
                maps = F.interpolate(maps, size=labels.shape[1:], mode=mode, align_corners=False)
            yield maps.movedim(1, -1)[images.inside], labels[images.inside]


class Readout:
    """A linear classifier of features.

    Args:
        weights: (F, K).
        bias: (K,).
    """

    def __init__(self, weights: Tensor, bias: Tensor) -> None:
        self._weights, self._bias = weights, bias

    def __call__(self, features: Tensor) -> Tensor:
        """Return the classes (n,) of features (n, F)."""
        return (features.double().nan_to_num(0, 0, 0) @ self._weights + self._bias).argmax(1)


def fit_readout(scans: Iterable[tuple[Tensor, Tensor]], *, num_classes: int) -> Readout:
    """Regress the classes of pixels on their features in float64, by sums that read each scan once.

    Args:
        scans: Features (n, F) and labels (n,) of each scan.
        num_classes: K.
    """
    counts = torch.zeros(num_classes, dtype=torch.float64)
    sums: Tensor | float = 0.0
    products: Tensor | float = 0.0
    for features, labels in scans:
        rows = features.double().nan_to_num(0, 0, 0)  # weights may have diverged: such a network has no features
        targets = F.one_hot(labels, num_classes).double()
        counts += targets.sum(0)
        of_classes = [rows[labels == value] for value in range(num_classes)]
        sums = sums + targets.T @ rows  # (K, F)
        products = products + torch.stack([some.T @ some for some in of_classes])  # (K, F, F)
    assert isinstance(sums, Tensor) and isinstance(products, Tensor)
    # Every pixel of a class weighs 1 / sqrt(number of its pixels), so a class weighs the square root of that number.
    of_pixel = counts.clamp_min(1).rsqrt()
    total = (of_pixel * counts).sum()
    prior = of_pixel * counts / total  # (K,)
    mean = (of_pixel[:, None] * sums).sum(0) / total
    covariance = (of_pixel[:, None, None] * products).sum(0) / total - mean[:, None] * mean
    deviation = covariance.diagonal().clamp_min(0).sqrt()
    scale = torch.where(deviation > 1e-12, 1 / deviation.clamp_min(1e-12), 0)  # a constant feature has no weight
    against = (of_pixel[:, None] * sums / total - prior[:, None] * mean).T * scale[:, None]  # (F, K)
    correlation = covariance * scale[:, None] * scale
    correlation.diagonal().add_(_RIDGE)
    weights = torch.linalg.solve(correlation, against) * scale[:, None]
    return Readout(weights, prior - mean @ weights)


def _even_indices(num: int, most: int) -> Tensor:
    """Return at most `most` of `num` indices, evenly spaced about the middle."""
    count = min(num, most)
    return (2 * torch.arange(count) + 1) * num // (2 * count)


def _select_images(images: Planes | Frames, chosen: Tensor) -> Planes | Frames:
    return replace(images, images=images.images[chosen], inside=images.inside[chosen])
