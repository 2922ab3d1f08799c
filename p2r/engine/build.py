"""The one door to DeepSpeed: a process group and a training engine, on GPUs (NCCL) and on CPUs (gloo) alike.

DeepSpeed would compile C++ operators at first use; the optimizer is torch's and all others are declared absent, so that no
compiler is needed.
"""

import logging
import os
from typing import Any

import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # there, but not in __all__

from p2r.config import PretrainConfig
from p2r.device import is_waited_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the weights in training, by `pretrain.precision`."""


def join_process_group(device: torch.device) -> tuple[int, int]:
    """Join the process group that the environment describes (torchrun, Ray), or make one of a single process.

    Returns:
        This process's rank, and the number of processes.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Set before anything asks: DeepSpeed would probe all its C++ operators with the compiler, and build one for gloo.
    deepspeed.ops.__compatible_ops__ = {}
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            # No address, no port: nothing that another process, or a child of this one, could collide with.
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists
            torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False, dist_init_required=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def build_engine(model: nn.Module, config: PretrainConfig, *, world_size: int) -> Any:
    """Wrap `model` into a DeepSpeed engine with AdamW, ZeRO and clipping as `config` says.

    The engine's gradients are averaged over ranks; the losses of `p2r.loss` expect exactly that.
    """
    import deepspeed

    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.optimizer.learning_rate,
        fused=True,  # one that can be told on the device to scale gradients, or to do nothing
    )
    micro_batch = config.micro_batch or config.global_batch // world_size
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    runs_ahead = config.precision == "bf16" and is_waited_for(next(model.parameters()).device)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": config.global_batch // (world_size * micro_batch),
            # A bucket is allocated whole: its default of 5e8 numbers is for models that are larger than ours.
            "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": min(500_000_000, num_weights)},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            # Looking for overflow makes the host wait for the device. What has overflowed shows in the next step's loss, and
            # no checkpoint is made before.
            "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": not runs_ahead},
            "gradient_clipping": 0.0 if runs_ahead else config.optimizer.clip_norm,
            "steps_per_print": 2**62,
            "wall_clock_breakdown": False,
        },
    )
    if runs_ahead and config.optimizer.clip_norm:
        _clip_on_device(optimizer, engine.optimizer, config.optimizer.clip_norm)
    return engine


def _clip_on_device(optimizer: torch.optim.Optimizer, zero: Any, clip_norm: float) -> None:
    """Scale gradients down as DeepSpeed would, which asks the device whether their norm is finite and so waits for it.

    Args:
        optimizer: Whose gradients are those of this rank's part of the weights.
        zero: DeepSpeed's optimizer around it, which knows the norm of all.
        clip_norm: Largest norm.
    """

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        excess = ((zero._global_grad_norm + 1e-6) / clip_norm).clamp(min=1.0)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.grad.mul_(1 / excess)

    optimizer.register_step_pre_hook(clip)
