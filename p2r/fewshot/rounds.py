"""Self-training in rounds: pseudo-labels of all unlabelled images, made at once, filtered, and learnt until the next round.

    round 0    nearest class prototypes on the frozen backbone    -> views agree? -> plausible? -> learnt for a part of the steps
    round 1... the mean teacher, where it is confident            -> views agree? -> plausible? -> learnt for as many steps
    then       the teacher labels the images of every step, as in weak_to_strong

Rounds end without a validation label: after a set number, or as soon as pseudo-labels hardly change. A pixel counts where all views of its
image (appearance, and mirrored where training mirrors) give it the same class, and where that class is plausible
(`p2r.fewshot.plausibility`). Both filters come from the labelled patients and the images; label files of the others are not opened.

Letters: P unlabelled images, K classes, *S their sizes. Sources: Snell et al. 2017 (prototypes); Xie et al. 2020 (noisy student: rounds, a
student under stronger augmentation); Yang et al. 2022 (ST++: stability of predictions as a filter).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.evaluate.inference import probabilities_of_images
from p2r.fewshot.plausibility import Plausibility, plausible
from p2r.fewshot.protocol import Settings, Trial
from p2r.randomness import keyed_generator
from p2r.views.draws import Draws
from p2r.views.intensity import draw_intensity

NOT_COUNTED = -1
_AT_ONCE = 16  # images


@dataclass(frozen=True)
class Unlabelled:
    """Unlabelled images, by frame."""

    images: Tensor
    """(P, 1, *S) in [0, 1]."""
    inside: Tensor
    """(P, *S) bool: pixels of the scan."""
    frames: Sequence[slice]
    """Which images belong to each frame."""


class Rounds:
    """Pseudo-labels of all unlabelled images, made again at the start of each round.

    Args:
        unlabelled: Images to label.
        first: Labels the first round: image -> logits.
        rules: Place and size that organs can have.
        trial: Its settings; keys the views.
        config: Ranges of the views.
        preparation: Pixel size; whole images or their centre.
        names: Of the K classes, background first.
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
        self._of, self._first, self._rules = unlabelled, first, rules
        self._trial, self._config, self._preparation, self._names = trial, config, preparation, names
        self.labels: Tensor | None = None
        """(P, *S) int16 class, or `NOT_COUNTED`; None: rounds have not begun, or are over."""
        self.told: list[dict[str, Any]] = []
        """Of each round, JSON values."""
        self._is_over = False

    @property
    def _settings(self) -> Settings:
        return self._trial.settings

    def at(self, step: int, teacher: nn.Module) -> str | None:
        """Make new pseudo-labels, or end the rounds, if that is due before this step (from 0).

        Returns:
            A line about the new round; None: nothing was due.
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
        self.told.append(self._facts(step, number, labels, frames, change))
        line = _line(self.told[-1])
        if change is not None and change < (settings.self_training_min_change or 0.0):
            return f"{line}; {self._end(step, 'change')}"
        return line

    def _end(self, step: int, why: str) -> str:
        self.labels, self._is_over = None, True
        self.told[-1] |= {"ended_at_step": step, "ended_by": why}
        return f"rounds end before step {step + 1}: the teacher labels every step from here on"

    def _label(self, network: nn.Module, number: int, threshold: float | None) -> tuple[Tensor, list[bool]]:
        """Label all images: classes where they count, and whether each frame's organs have a plausible size."""
        box = _box_read(self._of.images, self._preparation)
        labels = torch.zeros(self._of.inside.shape, dtype=torch.int16, device=self._of.inside.device)
        counts = torch.zeros_like(self._of.inside)
        for start in range(0, len(self._of.images), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            images, inside = self._of.images[(part, slice(None), *box)], self._of.inside[(part, *box)]
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
        # Sizes are judged before pixels are left out because views disagree: an organ's border is where they do.
        can_be, frames = plausible(labels, self._of.frames, self._rules)
        return labels.masked_fill_(~(can_be & counts), NOT_COUNTED), frames

    def _facts(
        self, step: int, number: int, labels: Tensor, frames: list[bool], change: float | None
    ) -> dict[str, Any]:
        counted = labels >= 0
        total = max(1, int(counted.sum()))
        read = int(self._of.inside[(slice(None), *_box_read(self._of.images, self._preparation))].sum())
        return {
            "step": step,
            "by": "teacher" if number else "prototypes",
            "counted_fraction": round(int(counted.sum()) / max(1, read), 4),  # of what the model reads
            "plausible_frames": sum(frames),
            "frames": len(frames),
            "class_fractions": {
                name: round(float((labels == value).sum()) / total, 5) for value, name in enumerate(self._names)
            },
            "change": None if change is None else round(change, 5),
        }

    def warnings(self) -> list[str]:
        """Return problems that did not end the training."""
        if self.told and not self.told[0]["plausible_frames"]:
            return [
                "no unlabelled frame has organs of a plausible size by the first pseudo-labels: nothing was learnt from them; widen "
                "plausible_size_factor or plausible_margin_mm"
            ]
        return []

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors for `restore`: labels, compressed, because most are background."""
        if self.labels is None:
            return {}
        packed = zlib.compress(self.labels.cpu().numpy().tobytes(), 1)
        return {"rounds.labels": torch.from_numpy(np.frombuffer(packed, np.uint8).copy())}

    def facts(self) -> dict[str, Any]:
        """Return JSON values for `restore`."""
        return {"told": self.told, "is_over": self._is_over}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.told, self._is_over = [dict(one) for one in facts["told"]], bool(facts["is_over"])
        packed = tensors.get("rounds.labels")
        if packed is not None:
            flat = np.frombuffer(zlib.decompress(packed.cpu().numpy().tobytes()), np.int16)
            shape, device = self._of.inside.shape, self._of.inside.device
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
    """Return the class of each pixel by the mean of several views, and where all views agree on it.

    The first view is the image as it is. Each further one has another appearance, and is mirrored where the views of training are.

    Args:
        network: Image -> logits.
        images: (B, 1, *S).
        inside: (B, *S) bool: other pixels never count.
        draws: Of B images.
        num_views: At least 1.
        threshold: Least mean probability of a class that counts; None: any.
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
            of_view = draws.named(f"view {number}")
            view = draw_intensity(
                images, of_view, config=config.views.intensity, spacing_mm=spacing, inside=inside
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
    """Return the part of all pixels that were or are foreground whose pseudo-label changed; 0 if there are none."""
    foreground = (before > 0) | (after > 0)
    return float(((before != after) & foreground).sum() / foreground.sum().clamp(min=1))


def _box_read(images: Tensor, preparation: Preparation) -> tuple[slice, ...]:
    """Return the part of images (P, 1, *S) that the model reads: all, or `image_size` about the centre."""
    if preparation.planes == "whole":
        return tuple(slice(0, size) for size in images.shape[2:])
    side = preparation.image_size
    starts = [max(0, (size - side) // 2) for size in images.shape[2:]]
    return tuple(slice(start, start + side) for start in starts)


def _line(told: Mapping[str, Any]) -> str:
    classes = ", ".join(f"{name} {100 * share:.2f} %" for name, share in told["class_fractions"].items())
    change = "" if told["change"] is None else f", {100 * told['change']:.1f} % of the foreground changed"
    return (
        f"pseudo-labels by {told['by']}: {100 * told['counted_fraction']:.1f} % of pixels count ({classes}), "
        f"{told['plausible_frames']} of {told['frames']} frames are plausible{change}"
    )
