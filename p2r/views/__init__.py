"""Augmentation: two views of one image, and where each pixel of the second lies in the first."""

from p2r.views.draws import Draws
from p2r.views.geometric import apply_warp, inside_mask, sample_geometry, warp_of
from p2r.views.intensity import apply_appearance, draw_intensity, sample_appearance
from p2r.views.pair import ViewPair, augment_labelled, augment_twice, make_views

__all__ = [
    "Draws",
    "ViewPair",
    "apply_appearance",
    "apply_warp",
    "augment_labelled",
    "augment_twice",
    "draw_intensity",
    "inside_mask",
    "make_views",
    "sample_appearance",
    "sample_geometry",
    "warp_of",
]
