"""A checkpoint that was made by other ranks, or on another ZeRO stage -> this engine, by DeepSpeed's universal checkpoint.

With ZeRO, every rank saves its part of one flat vector, which means nothing to another number of ranks. DeepSpeed's
converter cuts the parts back into parameters; whoever loads them takes what is its own now. Both sides read pickles: they
are for checkpoints from the job's own storage only.

What the loader gets wrong is put right here: on stage 3, all groups of parameters have the settings of the first (biases would
be decayed), and share one count of steps, which Adam then raises once for each (moments would be corrected for the wrong
step); no stage reads the network's buffers.
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
"""Stages then and now between which a universal checkpoint leads; stage 0 needs none."""


def refuse_inconvertible(then: tuple[int, int], now: tuple[int, int], *, where: str) -> None:
    """Raise `CheckpointError` if a checkpoint cannot be loaded by so many ranks on such a stage.

    Args:
        then: Number of ranks, and ZeRO stage, that made it.
        now: Those of this run.
        where: Its URL.
    """
    if then[1] != now[1] and (then[1], now[1]) not in _CONVERTIBLE:
        raise CheckpointError(
            f"{where} was made with pretrain.zero_stage {then[1]}, this run has {now[1]}: DeepSpeed carries the optimizer's state "
            f"between stages 1 and 2 only. Set pretrain.zero_stage={then[1]}, or start a new run from the weights with --fork NAME"
        )


def is_plain(then: tuple[int, int], now: tuple[int, int]) -> bool:
    """Return whether DeepSpeed loads the checkpoint as it is; the arguments are those of `refuse_inconvertible`."""
    return then == now or then[1] == now[1] == 0


def convert(folder: Path, target: Path) -> None:
    """Make a universal checkpoint.

    Args:
        folder: Holds `deepspeed/`, what the engine saved.
        target: Gets `deepspeed/`, the universal checkpoint.

    Raises:
        CheckpointError: DeepSpeed cannot convert it.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    settings = argparse.Namespace(
        input_folder=str(folder / TAG),
        output_folder=str(target / TAG),
        num_extract_workers=1,  # more are processes, which take longer to start than there is to do
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # stages 1 and 2 save none of what other engines say of tensor parallelism
    )
    (target / TAG).mkdir(parents=True)
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main(settings)
    except (AssertionError, RuntimeError, NotImplementedError, KeyError, OSError) as error:
        raise CheckpointError(
            f"DeepSpeed cannot convert the checkpoint to another number of ranks: {type(error).__name__}: {error}; "
            "resume on as many as made it"
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
    engine._config.load_universal_checkpoint = (
        True  # a setting that DeepSpeed reads when it loads, and at no other time
    )
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
