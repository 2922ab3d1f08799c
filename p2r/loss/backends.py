"""Implementations of the similarity sums: Triton kernels on GPUs that fit them, torch tiles elsewhere."""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from p2r.loss import tiles
from p2r.loss.tiles import sharpest


def without_kernels(
    dtype: torch.dtype, channels: int, *, temperature: float, num_pairs: int, device: torch.device, allows_tf32: bool
) -> str | None:
    """Return why a loss on a GPU has to use torch tiles, many times slower, and the way out; None if it can use the kernels.

    Args:
        dtype: Type of the embeddings.
        channels: E.
        temperature: Temperature; of a learnt one, the smallest.
        num_pairs: N.
        device: The GPU; a CPU gets the answer for an H100.
        allows_tf32: True if products of float32 may be rounded to TF32.
    """
    if find_spec("triton") is None:
        return "the loss has no kernels: Triton is not installed"
    most = sharpest(2 * num_pairs, dtype)
    if 1 / temperature > most:
        return (
            f"the loss has no kernels for a temperature of {temperature} and {num_pairs} pairs, whose sums would overflow or vanish in "
            f"float32: set pretrain.loss.temperature to {math.ceil(1e4 / most) / 1e4} or more"
        )
    from p2r.loss import kernels

    reason = kernels.unfit(dtype, channels, device=device, allows_tf32=allows_tf32)
    return None if reason is None else f"the loss has no kernels for these embeddings: {reason}"


def choose_backend(rows: Tensor) -> Any:
    """Return the module whose `sums` and `push` support these rows: Triton kernels if possible, otherwise torch tiles."""
    if rows.device.type == "cuda" and find_spec("triton") is not None:
        from p2r.loss import kernels

        if kernels.fit(rows):
            return kernels
    return tiles


def product_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype for products of rows."""
    return torch.promote_types(rows.dtype, torch.float32) if choose_backend(rows) is tiles else rows.dtype
