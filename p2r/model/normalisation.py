"""Normalisations per image, with statistics in fp32 independent of the network's precision.

If scale and shift are bfloat16, PyTorch stores the statistics of a bfloat16 map in bfloat16. A mean with three digits is too
imprecise where it is large compared with the standard deviation. With fp32 scale and shift, PyTorch keeps the statistics in
fp32 and still reads and writes the map in bfloat16. So only these few numbers are widened, never the map.

PyTorch's kernel of instance normalisation needs channels first. Maps with channels last are copied there and back, in the forward
pass and in the backward pass: two more reads and writes of the map each. torch.compile generates code for either layout, without
copies, so `model.channels_last: auto` means channels last only for compiled networks on GPUs.

Letters: B images, C channels, *S spatial.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InstanceNorm(nn.Module):
    """Normalise every channel of every image to mean 0 and variance 1, then scale and shift it; keep the memory layout.

    Args:
        num_features: C.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise `maps` (B, C, *S), in their dtype."""
        normalised = F.instance_norm(maps, weight=wide(self.weight), bias=wide(self.bias))
        # PyTorch's kernel returns channels first, and the next convolution would keep that layout.
        return normalised.contiguous(memory_format=layout_of(maps))


class GroupNorm(nn.GroupNorm):
    """Group normalisation with statistics in fp32; keeps the memory layout."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise `maps` (B, C, *S), in their dtype."""
        normalised = F.group_norm(maps, self.num_groups, wide(self.weight), wide(self.bias), self.eps)
        return normalised.contiguous(memory_format=layout_of(maps))


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with statistics in fp32."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Normalise `tokens` (..., C), in their dtype."""
        return F.layer_norm(tokens, self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)


def layout_of(maps: Tensor) -> torch.memory_format:
    """Return the memory layout of `maps` (B, C, *S): channels last, or channels first."""
    last = torch.channels_last if maps.ndim == 4 else torch.channels_last_3d
    is_last = maps.is_contiguous(memory_format=last) and not maps.is_contiguous()
    return last if is_last else torch.contiguous_format


def wide(parameter: Tensor) -> Tensor:
    """Return a weight in fp32 (float64 stays float64)."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))
