"""Two views and corresponding points -> the two sets of embeddings for a loss; and the segmentation model of a task.

Pix2Rep trains a network f to be equivariant to geometry: f(warped image) = warped f(image). Warping whole feature maps to
compare them would be expensive. Instead, features are read only at the sampled points (a pixel of view b, and its position in
view a), and only these are projected.

In a representation coarser than the image, pixel p has the position (p + 1/2) / stride - 1/2. So the borders of both grids
coincide, and a mirrored image has a mirrored representation.

Letters: B images, C contrasts, *S the D axes of an image (H W, or X Y Z), F feature channels, n points per image, E
embedding channels.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2r.config import ModelConfig, PretrainConfig
from p2r.model.backbones import EncoderDecoder, build_backbone, channels_of_levels
from p2r.model.heads import ProjectionHead
from p2r.model.reconstruction import ReconstructionHead, reconstruction_errors


class Pix2Rep(nn.Module):
    """Backbone and projection head, for pretraining.

    Args:
        config: Model section of a job.
        dimensions: Dimensions of the image, 2 or 3.
        learnt_temperature: Initial temperature of the loss if it is learnt; None if it is fixed.
        levels: Coarser decoder levels whose features are embedded as well, by a head each.
        reconstructs: Also predict the intensities of view b, by a head.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dimensions: int = 2,
        learnt_temperature: float | None = None,
        levels: Sequence[int] = (),
        reconstructs: bool = False,
    ) -> None:
        super().__init__()
        self.log_temperature: nn.Parameter | None = None
        if learnt_temperature is not None:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(learnt_temperature)]))
        self.stride = config.stride
        self.backbone: nn.Module = build_backbone(config, dimensions=dimensions)
        self.head = ProjectionHead(config.feature_channels, config.head_channels, config.embedding_channels)
        self.levels = tuple(levels)
        self.level_heads = nn.ModuleList(
            ProjectionHead(channels, config.head_channels, config.embedding_channels)
            for channels in (channels_of_levels(config, levels, dimensions=dimensions) if levels else ())
        )
        self.reconstruction_head: ReconstructionHead | None = None
        if reconstructs:
            self.reconstruction_head = ReconstructionHead(
                config.feature_channels, config.in_channels, stride=config.stride, dimensions=dimensions
            )

    @classmethod
    def of(cls, config: PretrainConfig) -> "Pix2Rep":
        """Build the network of a run, with random weights."""
        return cls(
            config.model,
            dimensions=config.image.dimensions,
            learnt_temperature=config.loss.temperature if config.loss.learn_temperature else None,
            levels=config.loss.levels,
            reconstructs=config.loss.reconstruction is not None,
        )

    def forward(
        self,
        view_a: Tensor,
        view_b: Tensor,
        points_a: Tensor,
        points_b: Tensor,
        target: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Embed corresponding points of two views, in one pass of the backbone over both.

        Args:
            view_a: (B, C, *S).
            view_b: (B, C, *S).
            points_a: (B, n, D) positions in view a, pixels along each axis; fractions are interpolated.
            points_b: (B, n, D) positions of the same anatomy in view b, whole pixels.
            target: (B, C, *S) intensities of view b to predict; None: no reconstruction.
            scored: (B, C, *S) bool, pixels whose prediction is scored.

        Returns:
            Queries from a and keys from b, (B * n, E) each; row i of both shows the same anatomy. With further levels, the embeddings of
            all levels follow one another in a row. With a target also the errors (B,) of the reconstruction.
        """
        images = torch.cat([view_a, view_b])
        embed = self._embed_levels if self.levels else self._embed
        features, queries, keys = embed(images, points_a, points_b)
        if self.reconstruction_head is None or target is None or scored is None:
            return queries, keys
        predicted = self.reconstruction_head(features.chunk(2)[1])
        return queries, keys, reconstruction_errors(predicted, target, scored)

    def _embed(self, images: Tensor, points_a: Tensor, points_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the features of both views, and the embeddings of their points."""
        features = self.backbone(images)  # (2B, F, *S / stride)
        features_a, features_b = features.chunk(2)
        if self.stride == 1:
            at_points = torch.cat([read_at(features_a, points_a), read_pixels(features_b, points_b)])  # (2B, n, F)
        else:
            points = torch.cat([points_a, points_b])
            at_points = read_at(features, (points + 0.5) / self.stride - 0.5)
        queries, keys = self.head(at_points).flatten(0, 1).chunk(2)  # (B * n, E) each
        return features, queries, keys

    def _embed_levels(self, images: Tensor, points_a: Tensor, points_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the finest features of both views, and the embeddings of their points at every level."""
        assert isinstance(self.backbone, EncoderDecoder)
        points = torch.cat([points_a, points_b])
        strides = [self.stride, *(1 << level for level in self.levels)]
        maps = self.backbone.levels(images, [stride.bit_length() - 1 for stride in strides])
        rows = [
            head(read_at(features, (points + 0.5) / stride - 0.5)).flatten(0, 1)
            for head, features, stride in zip([self.head, *self.level_heads], maps, strides, strict=True)
        ]
        queries, keys = torch.cat(rows, dim=1).chunk(2)  # (B * n, levels * E) each
        return maps[0], queries, keys


def read_at(features: Tensor, points: Tensor) -> Tensor:
    """Read maps at points by linear interpolation, in fp32 (float64 stays float64); exact at whole pixels.

    Args:
        features: (B, F, *S), S with D dimensions.
        points: (B, n, D) pixels along each axis, in [0, S - 1]; positions outside get the border's value.

    Returns:
        (B, n, F).

    Raises:
        ValueError: if the shapes do not match.
    """
    size = _check_points(features, points)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    along = zip(points.to(dtype).unbind(-1), size, strict=True)
    position = torch.stack([coordinate.clamp(0, length - 1) for coordinate, length in along], -1)
    low = position.long()
    high = torch.stack([(low[..., axis] + 1).clamp(max=length - 1) for axis, length in enumerate(size)], -1)
    fraction = position - low  # weight of `high`, in [0, 1)

    indices, weights = [], []
    for corner in itertools.product((0, 1), repeat=len(size)):  # 2^D, from all low to all high
        coordinates = [(high if up else low)[..., axis] for axis, up in enumerate(corner)]
        indices.append(_flatten_index(coordinates, size))
        shares = [fraction[..., axis] if up else 1 - fraction[..., axis] for axis, up in enumerate(corner)]
        weights.append(functools.reduce(torch.mul, shares))
    values = (
        _gather_pixels(features, torch.cat(indices, 1)).to(dtype) * torch.cat(weights, 1)[..., None]
    )  # (B, 2^D n, F)
    at_points: Tensor = values.view(len(points), len(indices), -1, values.shape[-1]).sum(1)
    return at_points


def read_pixels(features: Tensor, points: Tensor) -> Tensor:
    """Read maps at whole pixels: equal to `read_at`, with a fraction of the memory reads.

    Args:
        features: (B, F, *S).
        points: (B, n, D) whole numbers in [0, S - 1].

    Returns:
        (B, n, F) in fp32 (float64 stays float64).
    """
    size = _check_points(features, points)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return _gather_pixels(features, _flatten_index(list(points.long().unbind(-1)), size)).to(dtype)


def _check_points(features: Tensor, points: Tensor) -> list[int]:
    _, _, *size = features.shape
    if points.ndim != 3 or points.shape[-1] != len(size) or len(points) != len(features) or len(size) not in (2, 3):
        raise ValueError(
            f"expected features (B, F, H, W) and points (B, n, 2), or the same in 3D, "
            f"got {tuple(features.shape)} and {tuple(points.shape)}"
        )
    return size


def _flatten_index(coordinates: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    flat = torch.zeros_like(coordinates[0])
    for coordinate, length in zip(coordinates, size, strict=True):
        flat = flat * length + coordinate
    return flat


def _gather_pixels(features: Tensor, index: Tensor) -> Tensor:
    """Read (B, F, *S) at (B, m) flat positions -> (B, m, F), with a bitwise reproducible backward pass."""
    flat = features.flatten(2)
    if features.device.type == "cuda":
        # The backward pass of indexing adds in sorted order; that of gather would use atomic additions.
        image = torch.arange(len(flat), device=index.device)[:, None]
        return flat.transpose(1, 2)[image, index]
    return flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)


class Segmenter(nn.Module):
    """Backbone and a head, for training on a task's labels.

    For a linear probe, freeze the backbone with `backbone.requires_grad_(False)`: its forward pass then stores no activations
    for a backward pass. A frozen backbone stays in evaluation mode, so that batch normalisation and dropout of other tools' networks
    give in training the features that they give in evaluation.

    Args:
        backbone: Image (B, C, *S) -> features (B, F, *S), or coarser.
        head: Features -> logits, which are interpolated to the image's grid if they are coarser.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the head, and of the backbone unless it is frozen."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits (B, num_classes, *S) of `image` (B, C, *S)."""
        return self.logits_of(self.backbone(image), size=image.shape[2:])

    def logits_of(self, features: Tensor, *, size: Sequence[int]) -> Tensor:
        """Compute logits (B, num_classes, *S) of features (B, F, *s), with S = `size`."""
        logits: Tensor = self.head(features)
        if logits.shape[2:] == tuple(size):
            return logits
        return F.interpolate(
            logits, size=tuple(size), mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False
        )
