"""Contrasts of an image: their names, and which of them an image has.

An image has C named contrasts, such as t1 and flair, in the order of `model.contrasts`. The channel of a missing contrast is
zero everywhere. So a channel of zeros means a missing contrast, also where images are cut into windows or mixed, and no mask
has to travel with them.

Letters: B images, C contrasts, *S spatial.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

if TYPE_CHECKING:  # reading a job must not import torch, which takes seconds
    from torch import Tensor

LONGEST_NAME, MOST_CONTRASTS = 64, 64

Contrast = Annotated[str, Field(pattern=r"^[a-z0-9_]+$", max_length=LONGEST_NAME)]
"""Name of a contrast, such as t1, flair or t1_gd."""


def _check_different(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"must be different names, got {', '.join(twice)} more than once")
    return names


Contrasts = Annotated[
    tuple[Contrast, ...], Field(min_length=1, max_length=MOST_CONTRASTS), AfterValidator(_check_different)
]
"""Names of the contrasts of an image, in the order of its channels."""


def example_scan(contrasts: Sequence[str] | None) -> str:
    """Return the scan of a line of example code, in Python: a path, or a path for each contrast by its name."""
    if contrasts is None:
        return '"scan.nii.gz"'
    return "{" + ", ".join(f'"{name}": "{name}.nii.gz"' for name in contrasts) + "}"


def find_present(images: "Tensor") -> "Tensor":
    """Return the contrasts (B, C) bool that each image of (B, C, *S) has: those whose channel is not zero everywhere."""
    found: Tensor = images.flatten(2).abs().amax(2) > 0
    return found


def balance(images: "Tensor") -> "Tensor":
    """Scale each image (B, C, *S) by C / its number of contrasts, so that a sum over contrasts keeps its size.

    The first convolution of a network is such a sum: of one convolution for each contrast, of which missing ones give zero.
    An image without any contrast, and images of C = 1, stay unchanged.
    """
    num_contrasts = images.shape[1]
    if num_contrasts == 1:
        return images
    num_present = find_present(images).sum(1).clamp(min=1)
    factor = (num_contrasts / num_present).to(images.dtype)
    return images * factor.reshape(-1, *[1] * (images.ndim - 1))


def describe(contrasts: Sequence[str] | None) -> str:
    """Return names for a message, such as `flair, t1`, or `one contrast without a name`."""
    return "one contrast without a name" if contrasts is None else ", ".join(contrasts)
