"""The mutable state of training a segmenter (weights, teacher, optimizer), with saving and resuming.

A mean teacher is an average of the student's weights, and is the network that training returns. If the head has a warm-up, the
backbone is trained after it.
"""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from p2r.data.preprocess import Preparation
from p2r.evaluate.rows import CurvePoint
from p2r.fewshot.protocol import Settings, Trial
from p2r.fewshot.pseudo_labels import PseudoLabelTally
from p2r.fewshot.rounds import Rounds
from p2r.fewshot.saved_training import (
    LearnerFacts,
    SavedTraining,
    TrainingState,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)
from p2r.logs import Say
from p2r.model.compiling import warm_up
from p2r.model.pix2rep import Segmenter
from p2r.modes import MODES
from p2r.schedule import learning_rate

WARMUP_FRACTION = 0.05
"""Fraction of the steps in which the learning rate rises."""


class Learner:
    """The mutable state of one training: weights, teacher, optimizer, and recorded losses."""

    def __init__(
        self, segmenter: Segmenter, trial: Trial, *, num_classes: int, device: str, rounds: Rounds | None = None
    ) -> None:
        settings, kind = trial.settings, MODES[trial.mode].unlabelled
        assert settings.learning_rate is not None and settings.steps is not None
        self.segmenter, self._trial, self._steps, self._peak = segmenter, trial, settings.steps, settings.learning_rate
        self.teacher = copy.deepcopy(segmenter).requires_grad_(False) if kind != "none" else None
        self.tally = PseudoLabelTally(num_classes, self._steps, device) if kind == "pseudo_labels" else None
        self.rounds = rounds
        self.student, self.as_teacher = segmenter, self.teacher or segmenter
        self._is_frozen = not any(parameter.requires_grad for parameter in segmenter.backbone.parameters())
        self._warmup = 0 if self._is_frozen else min(settings.warmup_head_steps or 0, self._steps)
        groups = {"head": list(segmenter.head.parameters())}
        if not self._is_frozen:
            groups["backbone"] = list(segmenter.backbone.parameters())
            segmenter.backbone.requires_grad_(self._warmup == 0)
        self._optimizer = torch.optim.AdamW(
            [{"params": parameters, "name": name} for name, parameters in groups.items()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay or 0.0,
        )
        self.first, self.tail = torch.tensor(0.0), list[Tensor]()
        self.curve: list[CurvePoint] = []

    @property
    def settings(self) -> Settings:
        """Settings of the trial."""
        return self._trial.settings

    @property
    def found(self) -> Segmenter:
        """The network that training returns."""
        return self.teacher or self.segmenter

    def compile(self, batch_size: int, preparation: Preparation) -> str:
        """Use compiled networks for training steps; saving and validation use the original ones, with the same weights.

        Returns:
            A message for the log.
        """
        backbone = self.segmenter.backbone
        num_views = 2 if self.tally is not None else 0
        num_contrasts = len(preparation.contrasts or ("",))
        sides = [preparation.image_size] * preparation.dimensions
        shape = (batch_size * (1 + num_views), num_contrasts, *sides)
        is_compiled, message = warm_up(backbone, shape=shape, dtype=torch.float32)
        if is_compiled:
            self.student = _compile_segmenter(self.segmenter)
            if self.teacher is not None:
                self.as_teacher = _compile_segmenter(self.teacher)
        return message

    def set_rates(self, step: int) -> None:
        """Set the learning rates of a step; the backbone is trained after the head's warm-up."""
        if step >= self._warmup and not self._is_frozen:
            self.segmenter.backbone.requires_grad_(True)
        for group in self._optimizer.param_groups:
            # The backbone's rate rises from the end of the head's warm-up, and decays with the head's rate.
            is_backbone = group["name"] == "backbone"
            before = self._warmup if is_backbone else 0
            scale = (self.settings.backbone_learning_rate_factor or 1.0) if is_backbone else 1.0
            group["lr"] = scale * learning_rate(
                max(0, step - before),
                peak=self._peak,
                num_steps=max(1, self._steps - before),
                warmup_fraction=WARMUP_FRACTION,
            )

    def update(self, step: int, loss: Tensor) -> None:
        """Update the weights with the optimizer, and then the teacher."""
        self.first = loss.detach() if step == 0 else self.first
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(
            [parameter for parameter in self.segmenter.parameters() if parameter.requires_grad], 1.0
        )
        self._optimizer.step()
        if self.teacher is not None:
            decay = min(self.settings.ema_decay or 0.0, 1 - 1 / (step + 2))
            _update_teacher(self.teacher, self.segmenter, decay=decay)
        if step >= self._steps * 0.9 or step == self._steps - 1:
            self.tail.append(loss.detach())

    def state(self, step: int) -> TrainingState:
        """Return the training state after `step` steps."""
        tensors = {
            **module_tensors("student", self.segmenter),
            **({} if self.teacher is None else module_tensors("teacher", self.teacher)),
            **optimizer_tensors(self._optimizer),
            "first": self.first,
            "tail": torch.stack(self.tail) if self.tail else torch.zeros(0),
        }
        if self.rounds is not None:
            tensors |= self.rounds.tensors()
        facts = LearnerFacts(
            curve=self.curve,
            tally=None if self.tally is None else self.tally.state(),
            rounds=None if self.rounds is None else self.rounds.state(),
        )
        return TrainingState(step, tensors, facts)

    def resume(self, saved: SavedTraining | None, *, say: Say) -> int:
        """Restore the saved training state, if there is one, and return the number of completed steps."""
        state = None if saved is None else saved.load()
        if state is None:
            return 0
        restore_module("student", self.segmenter, state.tensors)
        if self.teacher is not None:
            restore_module("teacher", self.teacher, state.tensors)
        restore_optimizer(self._optimizer, state.tensors)
        device = next(self.segmenter.parameters()).device
        self.first = state.tensors["first"].to(device)
        self.tail = list(state.tensors["tail"].to(device))
        self.curve = list(state.facts.curve)
        if self.tally is not None and state.facts.tally is not None:
            self.tally.restore(state.facts.tally)
        if self.rounds is not None and state.facts.rounds is not None:
            self.rounds.restore(state.tensors, state.facts.rounds)
        say(f"{self._trial.id} | resumes after step {state.step}/{self._steps}")
        return state.step


def _compile_segmenter(segmenter: Segmenter) -> Segmenter:
    """Return a segmenter with the same weights, with a backbone that is compiled at its first use."""
    backbone = cast(nn.Module, torch.compile(segmenter.backbone, dynamic=False))
    return Segmenter(backbone, segmenter.head)


@torch.no_grad()
def _update_teacher(teacher: nn.Module, student: nn.Module, *, decay: float) -> None:
    theirs = [parameter.detach() for parameter in student.parameters()]
    torch._foreach_lerp_(list(teacher.parameters()), theirs, 1 - decay)
    for mine, other in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(other)
