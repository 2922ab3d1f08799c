"""Loading a checkpoint made by another number of ranks or ZeRO stage, through DeepSpeed's universal checkpoint.

With ZeRO, every rank saves its part of one flat vector, which is useless to another number of ranks. DeepSpeed's converter
splits the parts into parameters, and each rank loads its own part of them. Both sides read pickles, so they are used only for
checkpoints from the job's own storage.

Errors of the loader are corrected here. On stage 3, all parameter groups get the settings of the first (biases would be
decayed). They also share one step count, which Adam then increments once per group (a wrong correction of the moments). No
stage restores the network's buffers.
"""

import argparse
import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from p2r.errors import CheckpointError

TAG = "deepspeed"
_CONVERTIBLE = {(1, 1), (1, 2), (2, 1), (2, 2), (3, 3)}
"""Pairs of old and new stage that a universal checkpoint can convert; stage 0 needs no conversion."""


def refuse_inconvertible(then: tuple[int, int], now: tuple[int, int], *, where: str) -> None:
    """Raise `CheckpointError` if a checkpoint cannot be loaded by this number of ranks on this stage.

    Args:
        then: Number of ranks and ZeRO stage of the checkpoint.
        now: Number of ranks and ZeRO stage of this run.
        where: URL of the checkpoint.
    """
    if then[1] != now[1] and (then[1], now[1]) not in _CONVERTIBLE:
        raise CheckpointError(
            f"{where} was made with pretrain.zero_stage {then[1]}, this run has {now[1]}: DeepSpeed carries the optimizer's state "
            f"between stages 1 and 2 only. Set pretrain.zero_stage={then[1]}, or start a new run from the weights with --fork NAME"
        )


def is_plain(then: tuple[int, int], now: tuple[int, int]) -> bool:
    """Return whether DeepSpeed can load the checkpoint without conversion; for the arguments see `refuse_inconvertible`."""
    return then == now or then[1] == now[1] == 0


def convert(folder: Path, target: Path) -> None:
    """Convert a checkpoint to a universal checkpoint.

    Args:
        folder: Folder with `deepspeed/`, as saved by the engine.
        target: Folder for `deepspeed/`, the universal checkpoint.

    Raises:
        CheckpointError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    settings = argparse.Namespace(
        input_folder=str(folder / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,  # further processes would take longer to start than the work
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 do not save the tensor-parallel state of other engines
    )
    (target / TAG).mkdir(parents=True)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(settings)
    except (AssertionError, RuntimeError, NotImplementedError, KeyError, OSError) as error:
        raise CheckpointError(
            f"DeepSpeed cannot convert the checkpoint to another number of ranks: {type(error).__name__}: {error}; "
            "resume on the number of ranks that made it"
        ) from error


def load_universal(engine: Any, folder: Path, *, weights: Path) -> None:
    """Load a universal checkpoint. Collective.

    Args:
        engine: DeepSpeed engine.
        folder: From `convert`.
        weights: The checkpoint's `model.safetensors`, for the buffers.
    """
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups
    ]
    engine._config.load_universal_checkpoint = True  # DeepSpeed reads this setting only while loading
    try:
        engine.load_checkpoint(str(folder), tag=TAG)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, settings in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(settings)
    for values in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(values.get("step")):
            values["step"] = values["step"].clone()
    saved = load_file(weights)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            if name in saved:
                buffer.copy_(saved[name])
