"""Several segmenters of the same images -> one segmenter with their mean probabilities."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EnsembleSegmenter(nn.Module):
    """Mean of the members' probabilities, as logits. It commutes with blending windows and resampling, which are linear.

    Args:
        members: Segmenters of the same classes: image (B, C, *S) -> logits (B, num_classes, *S).

    Source: Lakshminarayanan, Pritzel and Blundell 2017 (deep ensembles); Mehrtash et al. 2020 (of segmentation networks).
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, image: Tensor) -> Tensor:
        """Compute the log of the mean probabilities, (B, num_classes, *S), of `image` (B, C, *S)."""
        logs = torch.stack([member(image).float().log_softmax(1) for member in self.members])
        return logs.logsumexp(0) - math.log(len(self.members))
