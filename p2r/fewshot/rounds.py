"""Self-training in rounds: all unlabelled images get pseudo-labels at once, which are filtered and learnt until the next round.

    round 0    nearest class prototypes on the frozen backbone    -> views agree? -> plausible? -> learnt for a part of the steps
    round 1... the mean teacher, where it is confident            -> views agree? -> plausible? -> learnt for as many steps
    then       the teacher labels the images of every step, as in weak_to_strong

Rounds end without a validation label: after a set number, or when pseudo-labels hardly change. A pixel counts if all views of its
image (appearance, and mirroring if training mirrors) give the same class, and if that class is plausible
(`p2r.fewshot.plausibility`). Both filters use only the labelled patients and the images; label files of other patients are not
opened.

Letters: P unlabelled images, K classes, *S their sizes. Sources: Snell et al. 2017 (prototypes); Xie et al. 2020 (noisy student: rounds, a
student under stronger augmentation); Yang et al. 2022 (ST++: stability of predictions as a filter).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.documents import JsonRow
from p2r.evaluate.inference import probabilities_of_images
from p2r.evaluate.rows import RoundRow
from p2r.fewshot.plausibility import Plausibility, plausible
from p2r.fewshot.protocol import Settings, Trial
from p2r.randomness import keyed_generator
from p2r.views.draws import Draws
from p2r.views.intensity import draw_intensity

NOT_COUNTED = -1
_BATCH_IMAGES = 16


@dataclass(frozen=True)
class Unlabelled:
    """Unlabelled images, by frame."""

    images: Tensor
    """(P, 1, *S) in [0, 1]."""
    inside: Tensor
    """(P, *S) bool: pixels of the scan."""
    frames: Sequence[slice]
    """Images of each frame."""


class RoundsState(JsonRow):
    """State of the rounds in an unfinished trial."""

    told: list[RoundRow]
    is_over: bool


class Rounds:
    """Pseudo-labels of all unlabelled images, made again at the start of each round.

    Args:
        unlabelled: Images to label.
        first: Network for the first round: image -> logits.
        rules: Plausible positions and sizes of organs.
        trial: The trial, for its settings and as the key of the views.
        config: Ranges of the views.
        preparation: Pixel size; whole images or their centre.
        names: Names of the K classes, background first.
    """

    def __init__(
        self,
        unlabelled: Unlabelled,
        first: nn.Module,
        rules: Plausibility,
        *,
        trial: Trial,
        config: FinetuneConfig,
        preparation: Preparation,
        names: Sequence[str],
    ) -> None:
        self._unlabelled, self._first, self._rules = unlabelled, first, rules
        self._trial, self._config, self._preparation, self._names = trial, config, preparation, names
        self.labels: Tensor | None = None
        """(P, *S) int16 class, or `NOT_COUNTED`; None before the first and after the last round."""
        self.told: list[RoundRow] = []
        """Description of each round."""
        self._is_over = False

    @property
    def _settings(self) -> Settings:
        return self._trial.settings

    def at(self, step: int, teacher: nn.Module) -> str | None:
        """Make new pseudo-labels, or end the rounds, if due before this step (from 0).

        Returns:
            A line about the new round; None if nothing was due.
        """
        settings = self._settings
        length = max(1, round((settings.self_training_fraction or 0.0) * (settings.steps or 1)))
        if self._is_over or step % length:
            return None
        number = step // length
        if number == (settings.self_training_rounds or 0):
            return self._end(step, "rounds")
        network, threshold = (self._first, None) if number == 0 else (teacher, settings.confidence_threshold)
        labels, frames = self._label(network, number, threshold)
        change = None if self.labels is None else changed_fraction(self.labels, labels)
        self.labels = labels
        self.told.append(self._describe_round(step, number, labels, frames, change))
        line = _format_round(self.told[-1])
        if change is not None and change < (settings.self_training_min_change or 0.0):
            return f"{line}; {self._end(step, 'change')}"
        return line

    def _end(self, step: int, why: str) -> str:
        self.labels, self._is_over = None, True
        self.told[-1] = self.told[-1].model_copy(update={"ended_at_step": step, "ended_by": why})
        return f"rounds end before step {step + 1}: from now on the teacher labels the images of every step"

    def _label(self, network: nn.Module, number: int, threshold: float | None) -> tuple[Tensor, list[bool]]:
        """Label all images; return classes (`NOT_COUNTED` where they do not count), and the plausibility of each frame."""
        box = _read_box(self._unlabelled.images, self._preparation)
        labels = torch.zeros(self._unlabelled.inside.shape, dtype=torch.int16, device=self._unlabelled.inside.device)
        counts = torch.zeros_like(self._unlabelled.inside)
        for start in range(0, len(self._unlabelled.images), _BATCH_IMAGES):
            part = slice(start, start + _BATCH_IMAGES)
            images = self._unlabelled.images[(part, slice(None), *box)]
            inside = self._unlabelled.inside[(part, *box)]
            key = ("agreement", self._trial.task, self._trial.num_labelled, self._trial.draw, number, start)
            draws = Draws.of_generators(
                [keyed_generator(self._config.seed, *key, index) for index in range(len(images))]
            )
            classes, is_agreed = agreed_classes(
                network,
                images,
                inside,
                draws=draws,
                num_views=self._settings.agreement_views or 1,
                threshold=threshold,
                config=self._config,
                preparation=self._preparation,
            )
            labels[(part, *box)], counts[(part, *box)] = classes.to(torch.int16), is_agreed
        # Sizes are checked before pixels with disagreeing views are left out, because views disagree at an organ's border.
        is_plausible, frames = plausible(labels, self._unlabelled.frames, self._rules)
        return labels.masked_fill_(~(is_plausible & counts), NOT_COUNTED), frames

    def _describe_round(
        self, step: int, number: int, labels: Tensor, frames: list[bool], change: float | None
    ) -> RoundRow:
        counted = labels >= 0
        total = max(1, int(counted.sum()))
        box = _read_box(self._unlabelled.images, self._preparation)
        read = int(self._unlabelled.inside[(slice(None), *box)].sum())
        return RoundRow(
            step=step,
            by="teacher" if number else "prototypes",
            counted_fraction=round(int(counted.sum()) / max(1, read), 4),  # of the pixels that the model reads
            plausible_frames=sum(frames),
            frames=len(frames),
            class_fractions={
                name: round(float((labels == value).sum()) / total, 5) for value, name in enumerate(self._names)
            },
            change=None if change is None else round(change, 5),
        )

    def warnings(self) -> list[str]:
        """Return problems that did not end the training."""
        if self.told and not self.told[0].plausible_frames:
            return [
                "no unlabelled frame has organs of a plausible size in the first pseudo-labels, so they had no effect; widen "
                "plausible_size_factor or plausible_margin_mm"
            ]
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors for `restore`: labels, compressed, because most are background."""
        if self.labels is None:
            return {}
        packed = zlib.compress(self.labels.cpu().numpy().tobytes(), 1)
        return {"rounds.labels": torch.from_numpy(np.frombuffer(packed, np.uint8).copy())}

    def state(self) -> "RoundsState":
        """Return the state for `restore`, besides the tensors."""
        return RoundsState(told=self.told, is_over=self._is_over)

    def restore(self, tensors: Mapping[str, Tensor], state: "RoundsState") -> None:
        """Restore a state."""
        self.told, self._is_over = list(state.told), state.is_over
        packed = tensors.get("rounds.labels")
        if packed is not None:
            flat = np.frombuffer(zlib.decompress(packed.cpu().numpy().tobytes()), np.int16)
            shape, device = self._unlabelled.inside.shape, self._unlabelled.inside.device
            self.labels = torch.from_numpy(flat.reshape(shape).copy()).to(device)


def agreed_classes(
    network: nn.Module,
    images: Tensor,
    inside: Tensor,
    *,
    draws: Draws,
    num_views: int,
    threshold: float | None,
    config: FinetuneConfig,
    preparation: Preparation,
) -> tuple[Tensor, Tensor]:
    """Return the class of each pixel by the mean of several views, and a mask of the pixels where all views agree.

    The first view is the unchanged image. Each further view has another appearance, and is mirrored if training mirrors.

    Args:
        network: Image -> logits.
        images: (B, 1, *S).
        inside: (B, *S) bool: other pixels never count.
        draws: Random numbers of B images.
        num_views: Number of views, at least 1.
        threshold: Minimum mean probability of a class that counts; None: any.
        config: Ranges of the views.
        preparation: Pixel size and image size.

    Returns:
        (B, *S) int64 and (B, *S) bool.
    """
    dimensions = images.ndim - 2
    axes = (None, *range(2, images.ndim)) if config.views.geometry.flip_probability > 0 else (None,)
    spacing = (preparation.spacing_mm,) * dimensions
    total = torch.zeros(())
    guesses = []
    for number in range(num_views):
        view = images
        if number:
            view_draws = draws.named(f"view {number}")
            view = draw_intensity(
                images, view_draws, config=config.views.intensity, spacing_mm=spacing, inside=inside
            ).masked_fill(~inside[:, None], 0)
        axis = axes[number % len(axes)]
        probabilities = probabilities_of_images(
            network, view if axis is None else view.flip(axis), preparation=preparation
        )
        probabilities = probabilities if axis is None else probabilities.flip(axis)
        total = total.to(images.device) + probabilities
        guesses.append(probabilities.argmax(1))
    confidence, classes = (total / num_views).max(1)
    counts = inside.clone()
    for guess in guesses:
        counts &= guess == classes
    return classes, counts if threshold is None else counts & (confidence >= threshold)


def changed_fraction(before: Tensor, after: Tensor) -> float:
    """Return the fraction of pixels with a changed pseudo-label, among those that were or are foreground; 0 without any."""
    foreground = (before > 0) | (after > 0)
    return float(((before != after) & foreground).sum() / foreground.sum().clamp(min=1))


def _read_box(images: Tensor, preparation: Preparation) -> tuple[slice, ...]:
    """Return the part of images (P, 1, *S) that the model reads: all, or `image_size` about the centre."""
    if preparation.planes == "whole":
        return tuple(slice(0, size) for size in images.shape[2:])
    side = preparation.image_size
    starts = [max(0, (size - side) // 2) for size in images.shape[2:]]
    return tuple(slice(start, start + side) for start in starts)


def _format_round(told: RoundRow) -> str:
    classes = ", ".join(f"{name} {100 * share:.2f} %" for name, share in told.class_fractions.items())
    change = "" if told.change is None else f", {100 * told.change:.1f} % of the foreground changed"
    return (
        f"pseudo-labels by {told.by}: {100 * told.counted_fraction:.1f} % of pixels count ({classes}), "
        f"{told.plausible_frames} of {told.frames} frames are plausible{change}"
    )
