"""Weak-to-strong consistency: unlabelled images and a teacher -> strongly augmented images with pseudo-labels, and their loss.

    unlabelled -> one geometry -> weak view   -> teacher -> class of every confident pixel of the scan
                               -> two strong views (appearance, then CutMix) -> student -> Dice + cross-entropy with that class

CutMix replaces a box of a strong view by the box of another image, along with its label or pseudo-label (`p2r.views.cutmix`).
If the other image is labelled, a random choice decides which of the two is the ground: so labels reach unlabelled anatomy, and
unlabelled anatomy reaches labelled images. Pixels without a confident pseudo-label do not count in the loss; all pixels of
labelled images do.

Letters: B images, K classes, *S their sizes. Sources: Sohn et al. 2020 (FixMatch); Yang et al. 2023 (UniMatch); Bai et al. 2023 (BCP).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2r.device import on_device
from p2r.documents import JsonRow
from p2r.evaluate.rows import PseudoLabelRow
from p2r.fewshot.protocol import Settings
from p2r.model.pix2rep import Segmenter
from p2r.views.cutmix import Labelled, draw_boxes, exchange
from p2r.views.draws import Draws
from p2r.views.pair import WeakAndStrong

_SMOOTHING = 1e-5  # as in MONAI, for the loss on labelled images
_NUM_INTERVALS = 20  # intervals of the training with separate statistics of pseudo-labels
_LAST_PART = 4  # a class without pseudo-labels in the last quarter of these has vanished


@torch.no_grad()
def pseudo_labels(teacher: nn.Module, weak: Tensor, shown: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the teacher's class of every pixel, and a mask of the confident pixels.

    Args:
        teacher: Image -> logits.
        weak: (B, C, *S), warped but otherwise unchanged.
        shown: (B, *S) bool, pixels of the scan.
        threshold: Minimum probability of a confident class.

    Returns:
        (B, *S) int64 and (B, *S) bool.
    """
    confidence, classes = teacher(weak).softmax(1).max(1)
    return classes, (confidence >= threshold) & shown


def strong_views(
    views: WeakAndStrong, classes: Tensor, counts: Tensor, labelled: Labelled, *, settings: Settings, draws: Draws
) -> Labelled:
    """Mix both strong views with other images.

    Args:
        views: Views of B unlabelled images.
        classes: (B, *S) pseudo-labels.
        counts: (B, *S) bool, pixels whose pseudo-label counts.
        labelled: The student's labelled images of this step.
        settings: Probabilities of the exchange.
        draws: Random numbers of the B images.

    Returns:
        2B images: the first strong view of each, then the second.
    """
    mixed = []
    for name, images in zip(("view a", "view b"), views.strong, strict=True):
        mixed.append(
            _apply_cutmix(Labelled(images, classes, counts), labelled, settings=settings, draws=draws.named(name))
        )
    return Labelled(*(torch.cat(parts) for parts in zip(*((m.images, m.labels, m.counts) for m in mixed), strict=True)))


def _apply_cutmix(unlabelled: Labelled, labelled: Labelled, *, settings: Settings, draws: Draws) -> Labelled:
    number, device = len(unlabelled.images), unlabelled.images.device
    is_mixed = draws.uniform("is mixed") < (settings.cutmix_probability or 0.0)
    with_labelled = draws.uniform("with a labelled image") < (settings.cutmix_labelled_fraction or 0.0)
    is_ground = draws.uniform("is the ground") < 0.5
    at = draws.uniform("partner")
    # The unlabelled partner is another image, unless there is only one.
    neighbours = (np.arange(number) + 1 + np.floor(at * max(1, number - 1))) % number
    partners = np.where(with_labelled, number + np.floor(at * len(labelled.images)), neighbours)
    both = Labelled(
        torch.cat([unlabelled.images, labelled.images]),
        torch.cat([unlabelled.labels, labelled.labels]),
        torch.cat([unlabelled.counts, labelled.counts]),
    )
    box = draw_boxes(draws, size=tuple(unlabelled.labels.shape[1:]), device=device)
    is_inverted = _broadcast_flags(with_labelled & ~is_ground, box)
    exchanged = (box ^ is_inverted) & _broadcast_flags(is_mixed, box)
    return exchange(unlabelled, both.take(on_device(partners, device, dtype=torch.int64)), exchanged)


def _broadcast_flags(flags: np.typing.NDArray[np.bool_], like: Tensor) -> Tensor:
    return on_device(flags, like.device, dtype=torch.bool).reshape(-1, *[1] * (like.ndim - 1))


def masked_dice_ce(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Return the Dice + cross-entropy loss over the pixels that count; 0 if there are none.

    Dice is computed per class over all images together, including background, as for labelled images.

    Args:
        logits: (B, K, *S).
        labels: (B, *S) int64.
        counts: (B, *S) bool.
    """
    log_probabilities = logits.log_softmax(1)
    mask = counts[:, None].to(logits.dtype)
    one_hot = F.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(logits.dtype) * mask
    pixels = (0, *range(2, logits.ndim))
    predicted = log_probabilities.exp() * mask
    both, sizes = (one_hot * predicted).sum(pixels), (one_hot + predicted).sum(pixels)
    dice = 1 - (2 * both + _SMOOTHING) / (sizes + _SMOOTHING)
    cross_entropy = -(one_hot * log_probabilities).sum() / mask.sum().clamp(min=1)
    return dice.mean() + cross_entropy


def logits_without_channels(student: Segmenter, weak: Tensor, *, fraction: float, draws: Draws) -> Tensor:
    """Return the student's logits (B, K, *S) of the weak views, after dropping a fraction of the backbone's output channels."""
    features = student.backbone(weak)
    kept = on_device(draws.uniform("channels", features.shape[1]) >= fraction, weak.device)
    dropped = features * kept.reshape(*kept.shape, *[1] * (features.ndim - 2)) / (1 - fraction)
    return student.logits_of(dropped, size=weak.shape[2:])


class TallyState(JsonRow):
    """State of a tally in an unfinished trial."""

    intervals: list[list[int]]
    open: list[int] | None
    """Counts of the current interval."""


@dataclass
class PseudoLabelTally:
    """Counts of pseudo-labels over training, in equal intervals of its steps."""

    num_classes: int
    steps: int
    """Number of steps of the whole training."""
    device: str = "cpu"
    intervals: list[list[int]] = field(default_factory=list)
    """For each interval: the last step, pixels of the scan, confident pixels of each class."""
    _open: Tensor | None = None
    """(1 + K,) counts of the current interval, on the device."""

    def add(self, step: int, classes: Tensor, counts: Tensor, shown: Tensor) -> None:
        """Count the pseudo-labels of one step (from 0); synchronises with the device only at the end of an interval."""
        class_counts = [((classes == value) & counts).sum() for value in range(self.num_classes)]
        step_counts = torch.stack([shown.sum(), *class_counts])
        self._open = step_counts if self._open is None else self._open + step_counts
        if (step + 1) % max(1, -(-self.steps // _NUM_INTERVALS)) == 0 or step + 1 == self.steps:
            self.intervals.append([step + 1, *self._open.tolist()])
            self._open = None

    def state(self) -> "TallyState":
        """Return the state for `restore`."""
        return TallyState(intervals=self.intervals, open=None if self._open is None else self._open.tolist())

    def restore(self, state: "TallyState") -> None:
        """Restore a state."""
        self.intervals = [list(one) for one in state.intervals]
        self._open = None if state.open is None else torch.tensor(state.open, device=self.device)

    def to_row(self, names: Sequence[str], *, threshold: float) -> PseudoLabelRow:
        """Return the statistics for a row of `report.json`.

        Args:
            names: Names of the K classes, background first.
            threshold: Minimum probability of a confident class.
        """
        counts = np.array(self.intervals, dtype=np.float64).reshape(-1, 2 + self.num_classes)
        confident = counts[:, 2:].sum(1)
        share = counts[:, 2:] / np.maximum(confident, 1)[:, None]
        never_found = [name for index, name in enumerate(names) if not counts[:, 2 + index].any()]
        warnings = []
        if not confident.any():
            warnings.append(
                f"no pixel reached confidence_threshold {threshold:g}, so unlabelled images had no effect; lower it, or train longer"
            )
        elif never_found:
            missing = ", ".join(never_found)
            warnings.append(f"no pseudo-label had class {missing}: it was learnt from labelled images only")
        last = counts[-max(1, len(counts) // _LAST_PART) :, 2:]
        vanished = [name for index, name in enumerate(names) if name not in never_found and not last[:, index].any()]
        if vanished:
            warnings.append(
                f"pseudo-labels of class {', '.join(vanished)} vanished in the course of training, so the network may have lost it; lower "
                "confidence_threshold, train longer, or label more patients"
            )
        return PseudoLabelRow(
            steps=counts[:, 0].astype(int).tolist(),
            confident_fraction=(confident / np.maximum(counts[:, 1], 1)).round(4).tolist(),
            class_fractions={name: share[:, index].round(5).tolist() for index, name in enumerate(names)},
            classes_never_found=never_found,
            warnings=warnings,
        )
