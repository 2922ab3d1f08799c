"""The only access to DeepSpeed: a process group and a training engine, on GPUs (NCCL) and CPUs (gloo) alike.

DeepSpeed would compile C++ operators at first use. The optimizer is torch's and all others are declared absent, so no compiler
is needed. `p2r.engine.update` checks gradients, clips them and averages the weights, in the same way for every ZeRO stage;
these features of DeepSpeed are disabled.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # there, but not in __all__

from p2r.config import PretrainConfig

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
"""Type of the weights in training, by `pretrain.precision`."""


def join_process_group(device: torch.device) -> tuple[int, int]:
    """Join the process group described by the environment (torchrun, Ray), or create one with a single process.

    Returns:
        This process's rank, and the number of processes.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Raised by DeepSpeed's own calls at ZeRO stage 3; users cannot act on it.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    # Set before the first query: DeepSpeed would probe all its C++ operators with the compiler, and build one for gloo.
    deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed would prepare an unused optimizer for torch.compile: 1.5 s of imports at every start.
    compiler.compile = lambda: compiler.dummy_decorator
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            # Without an address and port, no other process, not even a child, can collide with it.
            os.environ.setdefault("LOCAL_RANK", "0")  # required by DeepSpeed
            torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False, dist_init_required=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def build_engine(model: nn.Module, config: PretrainConfig, *, world_size: int) -> Any:
    """Wrap `model` into a DeepSpeed engine with AdamW and ZeRO, following `config`.

    Gradients are averaged over ranks, as the losses of `p2r.loss` require. `mean_weights` is this rank's part of the moving
    average (see `pretrain.ema_decay`), in the layout of `masters`; None if disabled.
    """
    import deepspeed

    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.optimizer.learning_rate,
        fused=True,  # can scale gradients, or skip the step, by tensors on the device
    )
    micro_batch = config.micro_batch or config.global_batch // world_size
    num_weights = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": config.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": config.global_batch // (world_size * micro_batch),
            "zero_optimization": {
                "stage": config.zero_stage,
                # A bucket is allocated in full: its default of 5e8 numbers is meant for larger models.
                "reduce_bucket_size": min(500_000_000, num_weights),
                # We compute the norm ourselves; stages 0 and 3 do not allow disabling DeepSpeed's.
                "compute_grad_norm": config.zero_stage not in (1, 2),
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "wall_clock_breakdown": False,
            # The throughput timer synchronises with the device twice per micro-batch, and nothing reads it.
            "timers": {"throughput": {"enabled": False, "synchronized": False}},
        },
    )
    engine.mean_weights = None
    if config.ema_decay is not None:
        engine.mean_weights = [part.detach().clone() for part in masters(engine)]
    return engine


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer inside DeepSpeed's."""
    optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer


def masters(engine: Any) -> list[Tensor]:
    """Return the fp32 weights that this rank updates: all, tensor by tensor, at ZeRO stage 0; its flat part from stage 1."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return list(engine.module.parameters())
    if stage < 3:
        return list(engine.optimizer.single_partition_of_fp32_groups)
    return list(engine.optimizer.fp32_partitioned_groups_flat)


def reduced_gradients(engine: Any) -> list[Tensor]:
    """Return the mean gradients over ranks held by this rank before a step: all at ZeRO stage 0, its part from stage 1."""
    if engine.zero_optimization_stage() == 0:
        trained = [weight for weight in engine.module.parameters() if weight.grad is not None]
        for weight in trained:
            if (
                weight.grad.stride() != weight.stride()
            ):  # differs for axes of one element; fused optimizers require equality
                weight.grad = torch.empty_like(weight).copy_(weight.grad)
        return [weight.grad for weight in trained]
    return [gradient for group in engine.optimizer.averaged_gradients.values() for gradient in group or ()]


@torch.no_grad()
def full_weights(engine: Any, *, mean: bool = False) -> dict[str, Tensor]:
    """Gather the whole model in fp32 on the host, under the names of its state. Collective.

    Args:
        engine: Engine at any ZeRO stage and precision; in bf16 training, the weights before rounding are returned.
        mean: Return the moving average of the weights; the engine must have one.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    partitioned = engine.zero_optimization_stage() > 0
    with _swap_in_mean(engine) if mean else _keep_weights():
        weights = {
            name: _to_host(safe_get_full_fp32_param(weight) if partitioned else weight)
            for name, weight in engine.module.named_parameters()
        }
    stored = engine.module.state_dict().keys()  # without buffers that follow from the architecture
    buffers = {name: _to_host(buffer) for name, buffer in engine.module.named_buffers() if name in stored}
    return weights | buffers


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


@torch.no_grad()
def set_mean_weights(engine: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the moving average of the weights from a whole model, as returned by `full_weights` on any number of ranks."""
    from deepspeed.utils import safe_set_full_fp32_param

    stage = engine.zero_optimization_stage()
    parts = masters(engine)
    kept = [part.detach().clone() for part in parts]
    for name, weight in engine.module.named_parameters():
        value = weights[name].to(engine.device, torch.float32)
        if stage == 0:
            weight.copy_(value)
        elif stage < 3:
            safe_set_full_fp32_param(weight, value)
        else:  # DeepSpeed's setter fails if the last rank's part is padded
            optimizer = engine.optimizer
            group, first, num = optimizer.grad_position[optimizer.get_param_id(weight)]
            here = value.flatten()[num * torch.distributed.get_rank() :][:num]
            parts[group].narrow(0, first, len(here)).copy_(here)
    for mean, part, before in zip(engine.mean_weights, parts, kept, strict=True):
        mean.copy_(part)
        part.copy_(before)


def gather_parameter(weight: nn.Parameter) -> None:
    """Gather a small ZeRO-3 parameter for use outside the forward pass; no effect at other stages."""
    status = getattr(weight, "ds_status", None)
    if status is not None and status.name != "AVAILABLE":
        weight.all_gather()  # type: ignore[attr-defined]


@contextmanager
def _swap_in_mean(engine: Any) -> Iterator[None]:
    parts = masters(engine)
    kept = [part.detach().clone() for part in parts]
    for part, mean in zip(parts, engine.mean_weights, strict=True):
        part.data.copy_(mean)
    try:
        yield
    finally:
        for part, before in zip(parts, kept, strict=True):
            part.data.copy_(before)


@contextmanager
def _keep_weights() -> Iterator[None]:
    yield
