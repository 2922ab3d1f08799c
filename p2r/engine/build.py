"""The one door to DeepSpeed: a process group and a training engine, on GPUs (NCCL) and on CPUs (gloo) alike.

DeepSpeed would compile C++ helpers at first use; the optimizer is torch's and the one helper that gloo would want is
declared absent, so that no compiler is needed.
"""

import logging
import os
import socket
from typing import Any

import torch
from torch import nn

from p2r.config import PretrainConfig


def join_process_group(device: torch.device) -> tuple[int, int]:
    """Join the process group that the environment describes (torchrun, Ray), or make one of a single process.

    Returns:
        This process's rank, and the number of processes.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        if "WORLD_SIZE" not in os.environ:
            os.environ.update(
                RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port()
            )
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": config.global_batch // world_size,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": config.precision == "bf16"},
            "gradient_clipping": config.optimizer.clip_norm,
            "steps_per_print": 2**62,
            "wall_clock_breakdown": False,
        },
    )
    return engine


def _free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
