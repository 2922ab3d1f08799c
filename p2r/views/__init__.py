"""Augmentation: two views of one image, and where each pixel of the second lies in the first."""

from p2r.views.geometric import apply_warp, inside_mask, sample_warps
from p2r.views.intensity import draw_intensity
from p2r.views.pair import ViewPair, augment_labelled, make_views

__all__ = [
    "ViewPair",
    "apply_warp",
    "augment_labelled",
    "draw_intensity",
    "inside_mask",
    "make_views",
    "sample_warps",
]
