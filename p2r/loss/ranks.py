"""What a loss over all ranks' rows needs of the other ranks.

`group=None` means the default process group where torch.distributed is initialised, and one process elsewhere.
"""

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

GradientScale = Literal["mean", "sum"]
"""How the reducer of gradients over ranks works: DDP and ZeRO average (`mean`), a plain all-reduce adds (`sum`)."""


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return this process's rank in the group and the group's size; (0, 1) without a group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def own_gradient_factor(gradient_scale: GradientScale, group: ProcessGroup | None) -> float:
    """Return what a rank's own part of the gradient is multiplied by, so that the reducer arrives at the whole."""
    if gradient_scale not in ("mean", "sum"):
        raise ValueError(f"gradient_scale must be 'mean' or 'sum', got {gradient_scale!r}")
    return float(rank_and_size(group)[1]) if gradient_scale == "mean" else 1.0


def check_equal_rows(rows: Tensor, group: ProcessGroup | None) -> None:
    """Raise ValueError on every rank unless all ranks hold tensors of one shape (gathering others would be garbage)."""
    if rank_and_size(group)[1] == 1:
        return
    shapes = all_gather_rows(torch.tensor([rows.shape], device=rows.device), group).tolist()
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"every rank must give equally many rows of one length, got shapes {shapes} by rank")


def all_gather_rows(rows: Tensor, group: ProcessGroup | None) -> Tensor:
    """Concatenate all ranks' rows in the order of ranks. Not differentiable: the caller knows its own part."""
    _, size = rank_and_size(group)
    if size == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(size)]
    dist.all_gather(parts, rows.contiguous(), group=group)
    return torch.cat(parts)


def all_reduce_sum(value: Tensor, group: ProcessGroup | None) -> Tensor:
    """Add up all ranks' tensors into a new one. Not differentiable."""
    total = value.clone()
    if rank_and_size(group)[1] > 1:
        dist.all_reduce(total, group=group)
    return total
