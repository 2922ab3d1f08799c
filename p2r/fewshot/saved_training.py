"""The training state of an unfinished trial, on the job's storage: a killed trial resumes from it.

One safetensors file, written atomically, holds everything that a step depends on: weights, teacher and optimizer state, and
other values as JSON in its header. All random numbers are keyed by the step, so no generator has to be saved.
On CPUs a resumed trial is bitwise equal to an uninterrupted one; CUDA kernels may add in a varying order.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from p2r.documents import JsonRow
from p2r.errors import InputError
from p2r.evaluate.rows import CurvePoint
from p2r.fewshot.pseudo_labels import TallyState
from p2r.fewshot.rounds import RoundsState
from p2r.storage import Storage
from p2r.tensors import read_facts

SAVE_INTERVAL_S = 120.0
"""Time between two saves, the most work that a kill can cost."""
_FORMAT = "p2r-training/1"


class LearnerFacts(JsonRow):
    """State of a learner besides its tensors."""

    curve: list[CurvePoint] = Field(default_factory=list)
    tally: TallyState | None = None
    rounds: RoundsState | None = None
    """None: the mode has no rounds of self-training."""


class _Facts(LearnerFacts):
    """JSON in the header of the file."""

    format: str
    step: Annotated[int, Field(ge=0, lt=2**53)]
    seconds: Annotated[float, Field(ge=0, le=1e12)]


_FACTS = TypeAdapter(_Facts)


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on, except the trial's settings and data."""

    step: int
    """Number of completed steps."""
    tensors: Mapping[str, Tensor]
    facts: LearnerFacts


class SavedTraining:
    """Storage location of one trial's training state.

    Args:
        storage: Storage of the task's trials.
        path: Path of the file.
        deadline: Time of `time.monotonic` at which to save and end. None: never.
    """

    def __init__(self, storage: Storage, path: str, *, deadline: float | None = None) -> None:
        self._storage, self._path, self._deadline = storage, path, deadline
        self._began = self._saved = time.monotonic()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the trial by this process, and by earlier ones up to their last save."""
        return self._seconds_before + time.monotonic() - self._began

    def add_seconds(self, seconds: float) -> None:
        """Add the time of an earlier training whose weights are reused."""
        self._seconds_before += seconds

    @property
    def is_due(self) -> bool:
        """True if it is time to save."""
        return self.is_over or time.monotonic() - self._saved >= SAVE_INTERVAL_S

    @property
    def is_over(self) -> bool:
        """True if the deadline has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def save(self, state: TrainingState) -> None:
        """Replace the stored state."""
        facts = {"format": _FORMAT, "step": state.step, "seconds": self.seconds, **state.facts.to_json()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        self._storage.write_bytes(self._path, save(tensors, metadata={"facts": json.dumps(facts)}))
        self._saved = time.monotonic()

    def load(self) -> TrainingState | None:
        """Return the stored state; None if it is absent, or this version cannot read it."""
        if not self._storage.exists(self._path):
            return None
        content = self._storage.read_bytes(self._path)
        try:
            tensors = load(content)
            facts = read_facts(content, _FACTS, where=self._storage.at(self._path))
        except (SafetensorError, ValueError, InputError):
            return None
        if facts.format != _FORMAT:
            return None
        self._seconds_before = facts.seconds
        return TrainingState(facts.step, tensors, facts)

    def delete(self) -> None:
        """Delete the stored state, after the trial is done."""
        self._storage.delete(self._path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state by `optimizer.PARAMETER.NAME`, without the settings of its groups."""
    return {
        f"optimizer.{index}.{name}": value
        for index, parameter_state in optimizer.state_dict()["state"].items()
        for name, value in parameter_state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore an optimizer from `optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a network's weights by `PREFIX.NAME`."""
    return {f"{prefix}.{name}": value for name, value in module.state_dict().items()}


def restore_module(prefix: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore a network from `module_tensors`."""
    start = f"{prefix}."
    module.load_state_dict(
        {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    )
