"""Several segmenters that read the same images -> one whose probabilities are the mean of theirs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EnsembleSegmenter(nn.Module):
    """Mean of the members' probabilities, as logits: blending windows and resampling are linear, so either may come first.

    Args:
        members: Image (B, C, *S) -> logits (B, num_classes, *S) each, of the same classes.

    Source: Lakshminarayanan, Pritzel and Blundell 2017 (deep ensembles); Mehrtash et al. 2020 (of segmentation networks).
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Turn `image` (B, C, *S) into the logarithm of the mean probabilities (B, num_classes, *S)."""
        logs = torch.stack([member(image).float().log_softmax(1) for member in self.members])
        return logs.logsumexp(0) - math.log(len(self.members))
