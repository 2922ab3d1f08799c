"""Section `pretrain.loss`: the objective over pixel pairs."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from p2r.config.section import Fraction, Section, is_none


def is_empty(values: object) -> bool:
    """Return whether a list is empty; then its field is left out, as in configurations before it."""
    return not values


class ReconstructionConfig(Section):
    """Masked reconstruction: blocks of view b are set to zero, and a 1x1 convolution on the features predicts its intensities there."""

    weight: PositiveFloat = 1.0
    """Weight of the term: the mean squared error in units of the variance of each view (1: no better than its mean)."""
    masked_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Fraction of an image's blocks that are masked, all contrasts alike; rounded to whole blocks."""
    block_mm: PositiveFloat = 16.0
    """Edge of a block, mm; rounded to whole pixels."""

    def block_size(self, spacing_mm: float) -> int:
        """Return the edge of a block, pixels."""
        return max(1, round(self.block_mm / spacing_mm))

    def num_masked(self, num_blocks: int) -> int:
        """Return the number of masked blocks of an image."""
        return round(self.masked_fraction * num_blocks)


class LossConfig(Section):
    """The objective over pixel pairs."""

    name: Literal["info_nce", "barlow_twins"] = "info_nce"
    """InfoNCE contrasts every pixel with all others (Pix2Rep); Barlow Twins decorrelates channels (Pix2Rep-v2)."""
    pixel_pairs_per_image: PositiveInt = 256
    """Corresponding pixels drawn from each pair of views. The N of a step is this times the global batch."""
    levels: tuple[PositiveInt, ...] = Field(default=(), exclude_if=is_empty)
    """Multi-level contrast: coarser decoder levels at which the pixel pairs are compared as well, such as [1, 2], each through a projection
    head of its own. The loss is the mean over all levels; reports state the health of the finest. Level 2 has one vector per 4 pixels along
    each axis. These heads are not published."""
    foreground_share: Fraction = 0.0
    """Fraction of these drawn among pixels brighter than their image's mean; the rest is drawn anywhere in the scan."""
    negatives: Literal["global_batch", "micro_batch", "image"] = "global_batch"
    """Pixels that serve as negatives. global_batch: all pixels of the step; combined with `micro_batch`, this encodes every image twice.
    micro_batch: the pixels of one micro-batch of all workers. image (InfoNCE only): the pixels of the same image, so that the same
    anatomy in other patients is not a negative."""
    form: Literal["cross_view", "nt_xent"] = "nt_xent"
    """InfoNCE only: negatives from the other view (N x N), or from both without the diagonal (2N x 2N, as Pix2Rep)."""
    temperature: PositiveFloat = 0.2
    """InfoNCE only: tau, the width of the softmax over cosine similarities. Below about 0.0124, float32 sums of exp(s / tau) would overflow
    or vanish: rows then need a maximum each, which GPUs compute without their kernels, many times slower. `p2r validate` notes it."""
    learn_temperature: bool = False
    """InfoNCE only: train tau with the weights, starting at `temperature`. It is clamped to [0.013, 1]: below, float32 sums would overflow
    or vanish."""
    decoupled: bool = False
    """InfoNCE only: leave the positive out of the denominator (decoupled contrastive learning)."""
    exclude_within_mm: PositiveFloat | None = None
    """InfoNCE only: exclude pixels of one image up to this distance from each other's negatives (.inf: all of an image). None: no limit."""
    exchange: Literal["all_gather", "ring"] = "all_gather"
    """InfoNCE only. all_gather: each worker holds all embeddings. ring (slower): each holds one other worker's at a time, passed around."""
    off_diagonal_weight: NonNegativeFloat = 0.005
    """Barlow Twins only: weight of the off-diagonal terms."""
    reconstruction: ReconstructionConfig | None = Field(default=None, exclude_if=is_none)
    """Masked reconstruction beside the contrast; {}: with its defaults. Pixel pairs are then drawn outside the masked blocks of view b, so
    a step encodes no further image. The head that predicts intensities is not published. None: the contrast only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.negatives == "image" and self.name != "info_nce":
            raise ValueError(f"negatives image needs name info_nce: {self.name} contrasts no pixels")
        if self.learn_temperature and self.name != "info_nce":
            raise ValueError(f"learn_temperature needs name info_nce: {self.name} has no temperature")
        if self.negatives == "image" and self.exclude_within_mm == math.inf:
            raise ValueError(
                "negatives image and exclude_within_mm .inf leave no negatives: give a radius, or leave it out"
            )
        return self
