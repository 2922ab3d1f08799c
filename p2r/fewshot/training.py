"""Labelled images -> a trained segmenter: the loops behind the modes, and nothing of tasks, splits or figures.

    train_segmenter     every mode that trains on augmented images: Dice + cross-entropy, and what its teacher asks for
    train_head          linear_probe on features that were computed once, without augmentation

All trials of one (n, draw) see the same images in the same order, whatever their mode. A mean teacher (Tarvainen and
Valpola 2017) is an average of the student's own weights; the student must also agree with it on unlabelled images, shown
to both in the same place and in different appearances. Weak-to-strong consistency (`p2r.fewshot.pseudo_labels`) has the same
teacher, whose confident classes the student learns. The weight of either rises as in the paper, and the teacher is what is
returned. Nothing waits for the device but a check of the loss every 25 steps.

`P` images: all planes of the labelled scans, or all their frames for a network of volumes, padded about their centre to a
common size `*S` (`H W`, or `X Y Z`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from numpy.typing import NDArray
from torch import Tensor, nn

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Frames, Planes, Preparation
from p2r.errors import OutOfTime, TrainingError
from p2r.evaluate.tasks import LabelledScan
from p2r.fewshot.learner import WARMUP_FRACTION, Learner
from p2r.fewshot.protocol import Trial
from p2r.fewshot.pseudo_labels import (
    PseudoLabelTally,
    logits_without_channels,
    masked_dice_ce,
    pseudo_labels,
    strong_views,
)
from p2r.fewshot.rounds import NOT_COUNTED, Rounds
from p2r.fewshot.saved_training import (
    SavedTraining,
)
from p2r.model.pix2rep import Segmenter
from p2r.randomness import keyed_generator
from p2r.schedule import learning_rate
from p2r.views.cutmix import Labelled
from p2r.views.draws import Draws
from p2r.views.pair import WeakAndStrong, augment_labelled, augment_weakly_and_strongly

Say = Callable[[str], None]
Look = Callable[[int, Segmenter], dict[str, Any]]
"""Steps done and the network so far -> what is kept of it, JSON values."""

_CHECK_STEPS = 25
_MAX_RISE = 5.0  # of the loss, over that of the first step, which is a guess


@dataclass(frozen=True)
class Images:
    """Images of several scans on one grid, on one device."""

    images: Tensor
    """(P, 1, *S) in [0, 1]."""
    inside: Tensor
    """(P, *S) bool: pixels of the scan."""
    labels: Tensor | None
    """(P, *S) int64; of pseudo-labels, `NOT_COUNTED` where there is none; None: unlabelled."""


def labelled_images(scans: Sequence[LabelledScan]) -> Images:
    """Put the images of scans on one grid, padded about their centre, because augmentation turns and cuts about the centre."""
    together = unlabelled_images([scan.planes for scan in scans])
    size = together.inside.shape[1:]
    return Images(together.images, together.inside, torch.cat([_padded(scan.label_planes, size) for scan in scans]))


def unlabelled_images(scans: Sequence[Planes | Frames]) -> Images:
    """Put images without labels on one grid, padded about their centre."""
    size = [max(sides) for sides in zip(*(scan.images.shape[2:] for scan in scans), strict=True)]
    return Images(
        torch.cat([_padded(scan.images, size) for scan in scans]),
        torch.cat([_padded(scan.inside, size) for scan in scans]),
        None,
    )


def _padded(maps: Tensor, size: Sequence[int]) -> Tensor:
    missing = [want - have for want, have in zip(size, maps.shape[-len(size) :], strict=True)]
    return F.pad(maps, [amount for side in reversed(missing) for amount in (side // 2, side - side // 2)])


@dataclass(frozen=True)
class Trained:
    """A trained network, and what its training tells."""

    segmenter: Segmenter
    """The teacher, if there is one."""
    loss: float | None
    """Mean of the last tenth of the steps; None: nothing was trained."""
    curve: tuple[dict[str, Any], ...] = ()
    """Everything that `look` returned."""
    pseudo_labels: PseudoLabelTally | None = None
    rounds: Sequence[Mapping[str, Any]] = ()
    """Of each round of self-training, JSON values."""
    warnings: Sequence[str] = ()
    """Problems that did not end the training."""


def train_segmenter(
    segmenter: Segmenter,
    labelled: Images,
    unlabelled: Images | None,
    *,
    trial: Trial,
    config: FinetuneConfig,
    preparation: Preparation,
    num_classes: int,
    device: str,
    say: Say = lambda line: None,
    look: Look | None = None,
    look_steps: int = 1,
    saved: SavedTraining | None = None,
    rounds: Rounds | None = None,
) -> Trained:
    """Train with Dice + cross-entropy on augmented images.

    Args:
        segmenter: Network, changed in place; parameters that do not require a gradient stay as they are.
        labelled: What it learns from.
        unlabelled: Of semi-supervised modes: images on which student and teacher must agree.
        trial: Settings; keys the order and augmentation, by (n, draw), not by mode.
        config: Batch, augmentation.
        preparation: Pixel size and image size.
        num_classes: Of the task, background included.
        device: Where it trains.
        say: Receives a line of progress now and then.
        look: Called with the number of steps done, and the network that would be returned, every `look_steps`.
        look_steps: See `look`.
        saved: Where the training state is saved every few minutes, and resumed from.
        rounds: Labels the unlabelled images in rounds, before the teacher does it at every step.

    Raises:
        TrainingError: if it diverges.
        OutOfTime: if the deadline of `saved` passes.
    """
    settings = trial.settings
    steps = settings.steps
    assert settings.learning_rate is not None and steps is not None and labelled.labels is not None
    run = Learner(segmenter, trial, num_classes=num_classes, device=device, rounds=rounds)
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
    segmenter.train()
    if config.compile:
        say(f"{trial.id} | {run.compile(config.batch_size, preparation)}")
    start = run.resume(saved, say=say)
    for step in range(start, steps):
        run.set_rates(step)
        if rounds is not None and (line := rounds.at(step, run.found)) is not None:
            say(f"{trial.id} | step {step} | {line}")
        key = ("finetune", trial.task, trial.num_labelled, trial.draw, step)
        batch = _labelled_batch(labelled, key, config=config, preparation=preparation, device=device)
        unlabelled_loss: Tensor | None = None
        if unlabelled is None or run.teacher is None:
            logits = run.student(batch.images)
        else:
            of_step = unlabelled if rounds is None else replace(unlabelled, labels=rounds.labels)
            views, draws = _views(of_step, key, config=config, preparation=preparation, device=device)
            if run.tally is None:
                logits = run.student(batch.images)
                unlabelled_loss = _disagreement(run.student, run.as_teacher, views)
            else:
                logits, unlabelled_loss = _weak_to_strong(run, step, batch, views, draws)
        loss = criterion(logits, batch.labels[:, None])
        if unlabelled_loss is not None:
            loss = loss + _consistency_weight(step, trial) * unlabelled_loss
        run.update(step, loss)
        is_look = look is not None and (step + 1) % look_steps == 0 and step + 1 < steps
        if (step + 1) % _CHECK_STEPS == 0 or step + 1 == steps or is_look:
            _check_finite(loss, trial, step)
        if (step + 1) % 100 == 0:
            say(f"{trial.id} | step {step + 1}/{steps} | loss {float(loss.detach()):.3f}")
        if look is not None and is_look:
            run.curve.append(look(step + 1, run.found))
        if saved is not None and (step + 1) % _CHECK_STEPS == 0 and step + 1 < steps and saved.is_due:
            saved.save(run.state(step + 1))
            if saved.is_over:
                raise OutOfTime(f"{trial.id} | time is over, saved after step {step + 1}/{steps}")
    return Trained(
        run.found.eval(),
        _checked(run.found, run.first, run.tail, trial),
        tuple(run.curve),
        run.tally,
        () if rounds is None else rounds.told,
        () if rounds is None else rounds.warnings(),
    )


def _labelled_batch(
    labelled: Images,
    key: tuple[int | str, ...],
    *,
    config: FinetuneConfig,
    preparation: Preparation,
    device: str,
) -> Labelled:
    chosen, generators = _draw(config, key, len(labelled.images))
    windows, is_scan, label = _windows(labelled, chosen, generators, preparation)
    assert label is not None
    image, label = augment_labelled(
        windows,
        label,
        config=config.views,
        size=preparation.image_size,
        spacing_mm=preparation.spacing_mm,
        generators=generators,
        inside=is_scan,
    )
    label = label.to(device)
    return Labelled(image.to(device), label, torch.ones_like(label, dtype=torch.bool))


def _views(
    unlabelled: Images,
    key: tuple[int | str, ...],
    *,
    config: FinetuneConfig,
    preparation: Preparation,
    device: str,
) -> tuple[WeakAndStrong, Draws]:
    """Augment unlabelled images of a step; and what else is drawn for each of them."""
    chosen, generators = _draw(config, (*key, "unlabelled"), len(unlabelled.images))
    windows, is_scan, labels = _windows(unlabelled, chosen, generators, preparation)
    views = augment_weakly_and_strongly(
        windows,
        is_scan,
        geometry=config.views.geometry,
        intensity=config.views.intensity if config.strong_intensity is None else config.strong_intensity,
        size=preparation.image_size,
        spacing_mm=preparation.spacing_mm,
        generators=generators,
        labels=labels,
    )
    (a, b), labels = views.strong, views.labels
    moved = WeakAndStrong(
        views.weak.to(device),
        (a.to(device), b.to(device)),
        views.shown.to(device),
        None if labels is None else labels.to(device),
    )
    return moved, Draws.of_generators(generators)


def _weak_to_strong(
    run: Learner, step: int, batch: Labelled, views: WeakAndStrong, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Return the logits of the labelled images, and the loss on the unlabelled ones, of one pass over all of them."""
    settings = run.settings
    assert run.teacher is not None and run.tally is not None
    if views.labels is None:
        threshold = settings.confidence_threshold or 0.0
        classes, counts = pseudo_labels(run.as_teacher, views.weak, views.shown, threshold=threshold)
    else:
        classes, counts = views.labels.clamp(min=0), (views.labels != NOT_COUNTED) & views.shown
    run.tally.add(step, classes, counts, views.shown)
    strong = strong_views(views, classes, counts, batch, settings=settings, draws=draws)
    # Normalisation never mixes images (p2r.model.backbones), so one pass gives what two would.
    of_labelled, of_strong = run.student(torch.cat([batch.images, strong.images])).split(
        [len(batch.images), len(strong.images)]
    )
    labels, is_counted = strong.labels, strong.counts
    if settings.feature_dropout:
        third = logits_without_channels(run.segmenter, views.weak, fraction=settings.feature_dropout, draws=draws)
        of_strong = torch.cat([of_strong, third])
        labels, is_counted = torch.cat([labels, classes]), torch.cat([is_counted, counts])
    return of_labelled, masked_dice_ce(of_strong, labels, is_counted)


def _checked(network: nn.Module, first: Tensor, tail: list[Tensor], trial: Trial) -> float:
    """Return the mean loss of the last steps, if it is that of a network that has learnt anything.

    Raises:
        TrainingError: Weights are not finite (the last update is in no loss), or the loss is far above what it began with.
    """
    last = float(torch.stack(tail).mean())
    if not all(bool(torch.isfinite(weight).all()) for weight in network.parameters()):
        raise _diverged(trial, "its weights are not finite after the last step")
    if last > _MAX_RISE * float(first):
        raise _diverged(trial, f"the loss rose from {float(first):.3g} to {last:.3g}")
    return last


def _check_finite(loss: Tensor, trial: Trial, step: int) -> None:
    # A loss that is not finite leaves weights that are not, so none is missed between two looks.
    if not torch.isfinite(loss):
        raise _diverged(trial, f"the loss is {float(loss.detach())} at step {step + 1}")


def _diverged(trial: Trial, what: str) -> TrainingError:
    return TrainingError(
        f"trial {trial.id} diverged: {what}, with learning rate {trial.settings.learning_rate:g}; "
        "lower finetune.search.learning_rates"
    )


def _draw(
    config: FinetuneConfig, key: tuple[int | str, ...], num_images: int
) -> tuple[NDArray[np.int64], list[np.random.Generator]]:
    chosen = keyed_generator(config.seed, *key).integers(num_images, size=config.batch_size)
    return chosen, [keyed_generator(config.seed, *key, slot) for slot in range(config.batch_size)]


def _consistency_weight(step: int, trial: Trial) -> float:
    """Rise from e^-5 of the weight to all of it: exp(-5 (1 - t)^2), as in the paper."""
    settings = trial.settings
    rising = (settings.ramp_up_fraction or 0.0) * (settings.steps or 1)
    t = min(1.0, step / rising) if rising > 0 else 1.0
    return (settings.consistency_weight or 0.0) * math.exp(-5 * (1 - t) ** 2)


def _disagreement(student: nn.Module, teacher: nn.Module, views: WeakAndStrong) -> Tensor:
    """Mean squared difference of the probabilities of student and teacher, over pixels of the scan and classes."""
    for_student, for_teacher = views.strong
    with torch.no_grad():
        target = teacher(for_teacher).softmax(1)
    squared = (student(for_student).softmax(1) - target).square().mean(1)
    disagreement: Tensor = (squared * views.shown).sum() / views.shown.sum().clamp(min=1)
    return disagreement


def _windows(
    of: Images, chosen: NDArray[np.int64], generators: list[np.random.Generator], preparation: Preparation
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The chosen images about their centre, or, if the model is to read all of them, about a place drawn anywhere in them.

    The windows have twice the edge of the network's image, room for augmentation to turn and cut about their centre.
    """
    if preparation.planes == "centre":
        index = torch.from_numpy(chosen)
        return of.images[index], of.inside[index], None if of.labels is None else of.labels[index]
    size = preparation.image_size
    kinds = [of.images, of.inside] if of.labels is None else [of.images, of.inside, of.labels]
    cut = []
    for image, generator in zip(chosen, generators, strict=True):
        # A window may reach over the edge only as far as it must: an image that fits is always seen whole.
        extents = of.images.shape[2:]
        starts = [_start(extent, size, generator) - size // 2 for extent in extents]
        padding = [
            amount
            for start, extent in zip(reversed(starts), reversed(extents), strict=True)
            for amount in (-start, start + 2 * size - extent)
        ]
        cut.append([F.pad(all_of_them[int(image)], padding) for all_of_them in kinds])
    images, inside, *labels = (torch.stack(parts) for parts in zip(*cut, strict=True))
    return images, inside, labels[0] if labels else None


def _start(extent: int, size: int, generator: np.random.Generator) -> int:
    if extent <= size:
        return -((size - extent) // 2)
    return int(generator.integers(extent - size + 1))


def train_head(
    head: nn.Module,
    scans: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    trial: Trial,
    config: FinetuneConfig,
    device: str,
    say: Say = lambda line: None,
    look: Callable[[int], dict[str, Any]] | None = None,
    look_steps: int = 1,
) -> tuple[float, tuple[dict[str, Any], ...]]:
    """Train a head with Dice + cross-entropy on features that do not change.

    Args:
        head: Features (B, F, *S) -> logits, on `device`, changed in place.
        scans: Of each: features (P, F, *s), labels (P, *S), inside (P, *S).
        trial: Settings; keys the order, by (n, draw).
        config: Batch.
        device: Where it trains.
        say: Receives a line of progress now and then.
        look: Called with the number of steps done every `look_steps`.
        look_steps: See `look`.

    Returns:
        The mean loss of the last tenth of the steps; and everything that `look` returned.

    Raises:
        TrainingError: if it diverges.
    """
    settings = trial.settings
    assert settings.learning_rate is not None and settings.steps is not None
    images = [
        (maps, label, is_scan) for scan in scans for maps, label, is_scan in zip(*scan, strict=True) if is_scan.any()
    ]
    criterion = DiceCELoss(softmax=True, to_onehot_y=True, batch=True)
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay or 0.0
    )
    first, tail, curve = torch.tensor(0.0), list[Tensor](), list[dict[str, Any]]()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=settings.learning_rate, num_steps=settings.steps, warmup_fraction=WARMUP_FRACTION
            )
        key = ("finetune", trial.task, trial.num_labelled, trial.draw, step)
        chosen = keyed_generator(config.seed, *key).integers(len(images), size=config.batch_size)
        logits, labels = [], []
        for index in chosen:
            maps, label, is_scan = images[int(index)]
            found = head(maps[None].to(device))
            if found.shape[2:] != label.shape:
                mode = "bilinear" if label.ndim == 2 else "trilinear"
                found = F.interpolate(found, size=label.shape, mode=mode, align_corners=False)
            at = is_scan.flatten().nonzero()[:, 0]
            logits.append(found.flatten(2)[:, :, at.to(device)])  # (1, K, n)
            labels.append(label.flatten()[at].to(device))
        loss = criterion(torch.cat(logits, dim=2), torch.cat(labels)[None, None])
        first = loss.detach() if step == 0 else first
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step >= settings.steps * 0.9 or step == settings.steps - 1:
            tail.append(loss.detach())
        is_look = look is not None and (step + 1) % look_steps == 0 and step + 1 < settings.steps
        if (step + 1) % _CHECK_STEPS == 0 or step + 1 == settings.steps or is_look:
            _check_finite(loss, trial, step)
        if (step + 1) % 100 == 0:
            say(f"{trial.id} | step {step + 1}/{settings.steps} | loss {float(loss.detach()):.3f}")
        if look is not None and is_look:
            curve.append(look(step + 1))
    return _checked(head, first, tail, trial), tuple(curve)
