"""Labelled images -> a trained segmenter: the training loops of the modes, independent of tasks, splits and metrics.

    train_segmenter     every mode that trains on augmented images: Dice + cross-entropy, plus the consistency loss of its teacher
    train_head          linear_probe on features that are computed once, without augmentation

All trials of one (n, draw) get the same images in the same order, in every mode. A mean teacher (Tarvainen and Valpola 2017) is
an average of the student's weights. The student is also trained to agree with it on unlabelled images, with the same geometry
and different appearances. Weak-to-strong consistency (`p2r.fewshot.pseudo_labels`) uses the same teacher; the student learns its
confident classes. The weight of either loss rises as in the paper, and training returns the teacher. Only a check of the loss
every 25 steps synchronises with the device.

`P` images: all slices of the labelled scans, or all frames for a network of volumes. They are padded about their centre to a
common size `*S` (`H W`, or `X Y Z`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn

from p2r.config import FinetuneConfig
from p2r.data.preprocess import Preparation
from p2r.errors import OutOfTime, TrainingError
from p2r.evaluate.rows import CurvePoint, RoundRow
from p2r.fewshot.images import Images, cut_windows, draw_images, prefer_foreground
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
from p2r.logs import Say
from p2r.model.pix2rep import Segmenter
from p2r.modes import Mode
from p2r.randomness import keyed_generator
from p2r.schedule import learning_rate
from p2r.views.cutmix import Labelled
from p2r.views.draws import Draws
from p2r.views.pair import WeakAndStrong, augment_labelled, augment_weakly_and_strongly

Look = Callable[[int, Segmenter], CurvePoint]
"""Validation callback: number of steps done, and the current network -> a point of the curve."""

_CHECK_STEPS = 25
_MAX_RISE = 5.0  # of the loss relative to the first step, where predictions are guesses


@dataclass(frozen=True)
class Trained:
    """A trained network, and the record of its training."""

    segmenter: Segmenter
    """The teacher, if there is one; otherwise the student."""
    loss: float | None
    """Mean of the last tenth of the steps; None without training."""
    curve: tuple[CurvePoint, ...] = ()
    """All return values of `look`."""
    pseudo_labels: PseudoLabelTally | None = None
    rounds: Sequence[RoundRow] = ()
    """Each round of self-training."""
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
        segmenter: Network, trained in place; parameters that do not require a gradient stay unchanged.
        labelled: Training images.
        unlabelled: Images for the consistency loss of semi-supervised modes.
        trial: The trial, for its settings; its (n, draw), not its mode, keys the order and augmentation.
        config: Fine-tuning section, for batch size and augmentation.
        preparation: Pixel size and image size.
        num_classes: Number of classes, including background.
        device: Device of the training.
        say: Receives lines of progress.
        look: Called every `look_steps` with the number of steps done and the network that training would return.
        look_steps: Interval of `look`.
        saved: Storage for the training state: saved every few minutes, and resumed from.
        rounds: Pseudo-labels in rounds, used before the teacher labels the images of every step.

    Raises:
        TrainingError: if the training diverges.
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
    after_step = _AfterStep(trial, say, None if look is None else lambda done: look(done, run.found), look_steps)
    start = run.resume(saved, say=say)
    for step in range(start, steps):
        run.set_rates(step)
        if rounds is not None and (line := rounds.at(step, run.found)) is not None:
            say(f"{trial.id} | step {step} | {line}")
        key = _key_of_step(trial, step)
        batch = _draw_labelled_batch(labelled, key, config=config, preparation=preparation, device=device)
        if unlabelled is None or run.teacher is None:
            loss = criterion(run.student(batch.images), batch.labels[:, None])
        else:
            step_images = unlabelled if rounds is None else replace(unlabelled, labels=rounds.labels)
            views, draws = _draw_views(
                step_images, key, mode=trial.mode, config=config, preparation=preparation, device=device
            )
            logits, unlabelled_loss = _semi_supervised(run, step, batch, views, draws)
            loss = criterion(logits, batch.labels[:, None]) + _consistency_weight(step, trial) * unlabelled_loss
        run.update(step, loss)
        after_step(step, loss, run.curve)
        if saved is not None and (step + 1) % _CHECK_STEPS == 0 and step + 1 < steps and saved.is_due:
            saved.save(run.state(step + 1))
            if saved.is_over:
                raise OutOfTime(f"{trial.id} | time is over, saved after step {step + 1}/{steps}")
    return Trained(
        run.found.eval(),
        _final_loss(run.found, run.first, run.tail, trial),
        tuple(run.curve),
        run.tally,
        () if rounds is None else rounds.told,
        () if rounds is None else rounds.warnings(),
    )


@dataclass(frozen=True)
class _AfterStep:
    """Checks, log lines and validations between the steps of a training."""

    trial: Trial
    say: Say
    look: Callable[[int], CurvePoint] | None
    look_steps: int

    def __call__(self, step: int, loss: Tensor, curve: list[CurvePoint]) -> None:
        """Check a step's loss from time to time, log it, and add the result of a due validation to `curve`."""
        done, steps = step + 1, self.trial.settings.steps or 1
        look = self.look if done % self.look_steps == 0 and done < steps else None
        if done % _CHECK_STEPS == 0 or done == steps or look is not None:
            _check_finite(loss, self.trial, step)
        if done % 100 == 0:
            self.say(f"{self.trial.id} | step {done}/{steps} | loss {float(loss.detach()):.3f}")
        if look is not None:
            curve.append(look(done))


def _key_of_step(trial: Trial, step: int) -> tuple[int | str, ...]:
    """Return the key of a step's random numbers: equal for all modes."""
    return ("finetune", trial.task, trial.num_labelled, trial.draw, step)


def _semi_supervised(
    run: Learner, step: int, batch: Labelled, views: WeakAndStrong, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Return the logits of the labelled images and the loss on the unlabelled ones, by pseudo-labels or by consistency."""
    if run.tally is not None:
        return _weak_to_strong_loss(run, step, batch, views, draws)
    logits = run.student(batch.images)
    return logits, _consistency_loss(run.student, run.as_teacher, views)


def _draw_labelled_batch(
    labelled: Images,
    key: tuple[int | str, ...],
    *,
    config: FinetuneConfig,
    preparation: Preparation,
    device: str,
) -> Labelled:
    chosen, generators = draw_images(config, key, len(labelled.images))
    num_shown = prefer_foreground(chosen, labelled, key, config)
    windows, is_scan, label = cut_windows(labelled, chosen, generators, preparation, num_shown=num_shown)
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


def _draw_views(
    unlabelled: Images,
    key: tuple[int | str, ...],
    *,
    mode: Mode,
    config: FinetuneConfig,
    preparation: Preparation,
    device: str,
) -> tuple[WeakAndStrong, Draws]:
    """Augment the unlabelled images of a step; return their views, and draws for CutMix and dropout."""
    chosen, generators = draw_images(config, (*key, "unlabelled"), len(unlabelled.images))
    windows, is_scan, labels = cut_windows(unlabelled, chosen, generators, preparation)
    views = augment_weakly_and_strongly(
        windows,
        is_scan,
        geometry=config.views.geometry,
        intensity=config.strong_intensity_of(mode),
        size=preparation.image_size,
        spacing_mm=preparation.spacing_mm,
        generators=generators,
        labels=labels,
        contrast_dropout=config.views.contrast_dropout,
    )
    (a, b), labels = views.strong, views.labels
    on_device = WeakAndStrong(
        views.weak.to(device),
        (a.to(device), b.to(device)),
        views.shown.to(device),
        None if labels is None else labels.to(device),
    )
    return on_device, Draws.of_generators(generators)


def _weak_to_strong_loss(
    run: Learner, step: int, batch: Labelled, views: WeakAndStrong, draws: Draws
) -> tuple[Tensor, Tensor]:
    """Return the logits of the labelled images and the loss on the unlabelled ones, from one forward pass over both."""
    settings = run.settings
    assert run.teacher is not None and run.tally is not None
    if views.labels is None:
        threshold = settings.confidence_threshold or 0.0
        classes, counts = pseudo_labels(run.as_teacher, views.weak, views.shown, threshold=threshold)
    else:
        classes, counts = views.labels.clamp(min=0), (views.labels != NOT_COUNTED) & views.shown
    run.tally.add(step, classes, counts, views.shown)
    strong = strong_views(views, classes, counts, batch, settings=settings, draws=draws)
    # Normalisation never mixes images (p2r.model.backbones), so one pass is equal to two.
    labelled_logits, strong_logits = run.student(torch.cat([batch.images, strong.images])).split(
        [len(batch.images), len(strong.images)]
    )
    labels, is_counted = strong.labels, strong.counts
    if settings.feature_dropout:
        third = logits_without_channels(run.segmenter, views.weak, fraction=settings.feature_dropout, draws=draws)
        strong_logits = torch.cat([strong_logits, third])
        labels, is_counted = torch.cat([labels, classes]), torch.cat([is_counted, counts])
    return labelled_logits, masked_dice_ce(strong_logits, labels, is_counted)


def _final_loss(network: nn.Module, first: Tensor, tail: list[Tensor], trial: Trial) -> float:
    """Return the mean loss of the last steps, after checking that the training did not diverge.

    Raises:
        TrainingError: if weights are not finite (no loss includes the last update), or the loss is far above its first value.
    """
    last = float(torch.stack(tail).mean())
    if not all(bool(torch.isfinite(weight).all()) for weight in network.parameters()):
        raise _make_divergence_error(trial, "its weights are not finite after the last step")
    if last > _MAX_RISE * float(first):
        raise _make_divergence_error(trial, f"the loss rose from {float(first):.3g} to {last:.3g}")
    return last


def _check_finite(loss: Tensor, trial: Trial, step: int) -> None:
    # After a non-finite loss all later losses are non-finite too, so occasional checks suffice.
    if not torch.isfinite(loss):
        raise _make_divergence_error(trial, f"the loss is {float(loss.detach())} at step {step + 1}")


def _make_divergence_error(trial: Trial, symptom: str) -> TrainingError:
    return TrainingError(
        f"trial {trial.id} diverged: {symptom}, with learning rate {trial.settings.learning_rate:g}; "
        "lower finetune.search.learning_rates"
    )


def _consistency_weight(step: int, trial: Trial) -> float:
    """Return the weight of a step, which rises from e^-5 of the full weight to 1: exp(-5 (1 - t)^2), as in the paper."""
    settings = trial.settings
    rising = (settings.ramp_up_fraction or 0.0) * (settings.steps or 1)
    t = min(1.0, step / rising) if rising > 0 else 1.0
    return (settings.consistency_weight or 0.0) * math.exp(-5 * (1 - t) ** 2)


def _consistency_loss(student: nn.Module, teacher: nn.Module, views: WeakAndStrong) -> Tensor:
    """Return the mean squared difference of the probabilities of student and teacher, over pixels of the scan and classes."""
    student_view, teacher_view = views.strong
    with torch.no_grad():
        target = teacher(teacher_view).softmax(1)
    squared = (student(student_view).softmax(1) - target).square().mean(1)
    loss: Tensor = (squared * views.shown).sum() / views.shown.sum().clamp(min=1)
    return loss


def train_head(
    head: nn.Module,
    scans: Sequence[tuple[Tensor, Tensor, Tensor]],
    *,
    trial: Trial,
    config: FinetuneConfig,
    device: str,
    say: Say = lambda line: None,
    look: Callable[[int], CurvePoint] | None = None,
    look_steps: int = 1,
) -> tuple[float, tuple[CurvePoint, ...]]:
    """Train a head with Dice + cross-entropy on fixed features.

    Args:
        head: Features (B, F, *S) -> logits, on `device`, trained in place.
        scans: For each scan: features (P, F, *s), labels (P, *S), inside (P, *S).
        trial: The trial, for its settings; its (n, draw) keys the order.
        config: Fine-tuning section, for the batch size.
        device: Device of the training.
        say: Receives lines of progress.
        look: Called every `look_steps` with the number of steps done.
        look_steps: Interval of `look`.

    Returns:
        The mean loss of the last tenth of the steps; and all return values of `look`.

    Raises:
        TrainingError: if the training diverges.
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
    first, tail, curve = torch.tensor(0.0), list[Tensor](), list[CurvePoint]()
    after_step = _AfterStep(trial, say, look, look_steps)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, peak=settings.learning_rate, num_steps=settings.steps, warmup_fraction=WARMUP_FRACTION
            )
        chosen = keyed_generator(config.seed, *_key_of_step(trial, step)).integers(len(images), size=config.batch_size)
        logits, labels = zip(
            *(_pixels_of_scan(head, *images[int(index)], device=device) for index in chosen), strict=True
        )
        loss = criterion(torch.cat(logits, dim=2), torch.cat(labels)[None, None])
        first = loss.detach() if step == 0 else first
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step >= settings.steps * 0.9 or step == settings.steps - 1:
            tail.append(loss.detach())
        after_step(step, loss, curve)
    return _final_loss(head, first, tail, trial), tuple(curve)


def _pixels_of_scan(
    head: nn.Module, maps: Tensor, label: Tensor, is_scan: Tensor, *, device: str
) -> tuple[Tensor, Tensor]:
    """Return the logits (1, K, n) and labels (n,) of the n pixels of an image that are in the scan."""
    logits = head(maps[None].to(device))
    if logits.shape[2:] != label.shape:
        mode = "bilinear" if label.ndim == 2 else "trilinear"
        logits = F.interpolate(logits, size=label.shape, mode=mode, align_corners=False)
    at = is_scan.flatten().nonzero()[:, 0]
    return logits.flatten(2)[:, :, at.to(device)], label.flatten()[at].to(device)
