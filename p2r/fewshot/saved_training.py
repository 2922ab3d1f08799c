"""The training state of an unfinished trial, on the job's storage: a killed trial resumes where it was saved, to the same bits.

One safetensors file, whole or absent, holds everything that a step depends on: weights, the teacher's, the optimizer's state. What is
no tensor is JSON in its header. Everything that is drawn is keyed by the step, so there is no generator to save.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from p2r.errors import InputError
from p2r.storage import Storage
from p2r.tensors import read_facts

SAVE_INTERVAL_S = 120.0
"""Time between two saves: what a kill costs at most."""
_FORMAT = "p2r-training/1"


class _Facts(BaseModel):
    """What this file computes with; the learner keeps more."""

    model_config = ConfigDict(strict=True, extra="allow")
    format: str
    step: Annotated[int, Field(ge=0, lt=2**53)]
    seconds: Annotated[float, Field(ge=0, le=1e12)]


_FACTS = TypeAdapter(_Facts)


@dataclass(frozen=True)
class TrainingState:
    """All that the next step depends on, beside the trial's own settings and data."""

    step: int
    """Steps done."""
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON values."""


class SavedTraining:
    """The place of one trial's training state.

    Args:
        storage: Of the task's trials.
        path: The file.
        deadline: Of `time.monotonic`: when to save and end. None: never.
    """

    def __init__(self, storage: Storage, path: str, *, deadline: float | None = None) -> None:
        self._storage, self._path, self._deadline = storage, path, deadline
        self._began = self._saved = time.monotonic()
        self._seconds_before = 0.0

    @property
    def seconds(self) -> float:
        """Time spent on the trial, by this process and, up to their last save, by those before."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return self.is_over or time.monotonic() - self._saved >= SAVE_INTERVAL_S

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def save(self, state: TrainingState) -> None:
        """Replace what is stored."""
        facts = {"format": _FORMAT, "step": state.step, "seconds": self.seconds, **state.facts}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        self._storage.write_bytes(self._path, save(tensors, metadata={"facts": json.dumps(facts)}))
        self._saved = time.monotonic()

    def load(self) -> TrainingState | None:
        """Return what is stored; None if there is nothing, or nothing that this version can read."""
        if not self._storage.exists(self._path):
            return None
        content = self._storage.read_bytes(self._path)
        try:
            tensors = load(content)
            facts = read_facts(content, _FACTS, where=self._storage.at(self._path))
        except (SafetensorError, ValueError, InputError):
            return None
        if facts["format"] != _FORMAT:
            return None
        self._seconds_before = float(facts["seconds"])
        return TrainingState(facts["step"], tensors, facts)

    def delete(self) -> None:
        """Remove what is stored: the trial is done."""
        self._storage.delete(self._path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state by `optimizer.PARAMETER.NAME`; its groups' settings are not in it."""
    return {
        f"optimizer.{index}.{name}": value
        for index, of_parameter in optimizer.state_dict()["state"].items()
        for name, value in of_parameter.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
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
    """Put back what `module_tensors` returned."""
    start = f"{prefix}."
    module.load_state_dict(
        {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    )
