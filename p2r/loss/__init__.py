"""Views -> corresponding points; embeddings of corresponding points -> a scalar to minimise."""

from p2r.loss.backends import without_kernels
from p2r.loss.barlow import barlow_twins
from p2r.loss.contrast import SameImage
from p2r.loss.info_nce import info_nce
from p2r.loss.points import corresponding_points
from p2r.loss.ranks import Findings
from p2r.loss.within_image import info_nce_within_images

__all__ = [
    "Findings",
    "SameImage",
    "barlow_twins",
    "corresponding_points",
    "info_nce",
    "info_nce_within_images",
    "without_kernels",
]
