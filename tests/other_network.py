"""Networks of another tool, as a job names them under `finetune.other`."""

import torch
from torch import Tensor, nn


def edges(*, features: int) -> nn.Module:
    """Return a network with fixed weights and coarser features."""
    network = nn.Conv2d(1, features, 3, stride=2, padding=1)
    with torch.no_grad():
        network.weight.copy_(torch.linspace(-1, 1, network.weight.numel()).reshape(network.weight.shape))
        network.bias.zero_()  # type: ignore[union-attr]
    return network


class _Of(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, image: Tensor) -> Tensor:
        if self.kind == "picky":
            raise ValueError("not this size")
        return torch.zeros(len(image), 5)


def vector() -> nn.Module:
    """Return a network with one vector per image."""
    return _Of("vector")


def picky() -> nn.Module:
    """Return a network that refuses every image."""
    return _Of("picky")


def text() -> str:
    """Return no network."""
    return "text"
