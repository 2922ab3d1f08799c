"""Normalisations that treat every image by itself, with statistics in fp32 whatever the network computes in.

PyTorch keeps the statistics of a bfloat16 map in bfloat16 where scale and shift are bfloat16 too, and a mean of three
digits is worth little where it is large beside the deviation. Given a scale and shift in fp32, it keeps them in fp32 and
still reads and writes the map in bfloat16: so these few numbers are widened, and never the map.

PyTorch's kernel for instances takes maps with channels first. One with channels last is copied there and back, in the forward pass
and in the backward pass: two reads and two writes of the map more, each. torch.compile can fuse them; no GPU has measured it.

Letters: B images, C channels, *S spatial.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InstanceNorm(nn.Module):
    """Every channel of every image to mean 0 and variance 1, then scaled and shifted. Keeps the map's layout in memory.

    Args:
        num_features: C.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, maps: Tensor) -> Tensor:
        """Turn `maps` (B, C, *S) into normalised ones, in their dtype."""
        normalised = F.instance_norm(maps, weight=wide(self.weight), bias=wide(self.bias))
        # PyTorch's kernel answers channels first; the next convolution would follow it.
        return normalised.contiguous(memory_format=layout_of(maps))


class GroupNorm(nn.GroupNorm):
    """PyTorch's, with statistics in fp32. Keeps the map's layout in memory."""

    def forward(self, maps: Tensor) -> Tensor:
        """Turn `maps` (B, C, *S) into normalised ones, in their dtype."""
        normalised = F.group_norm(maps, self.num_groups, wide(self.weight), wide(self.bias), self.eps)
        return normalised.contiguous(memory_format=layout_of(maps))


class LayerNorm(nn.LayerNorm):
    """PyTorch's, with statistics in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Turn `tokens` (..., C) into normalised ones, in their dtype."""
        return F.layer_norm(tokens, self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


def layout_of(maps: Tensor) -> torch.memory_format:
    """Return how `maps` (B, C, *S) lie in memory: channels last, or first."""
    last = torch.channels_last if maps.ndim == 4 else torch.channels_last_3d
    is_last = maps.is_contiguous(memory_format=last) and not maps.is_contiguous()
    return last if is_last else torch.contiguous_format


def wide(parameter: Tensor) -> Tensor:
    """Return a weight in fp32 (float64 stays)."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
