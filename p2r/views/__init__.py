"""Augmentation: two views of one image, and the position in the first view of each pixel of the second."""

from p2r.views.cutmix import Labelled, draw_boxes, exchange
from p2r.views.draws import Draws
from p2r.views.geometric import apply_warp, inside_mask, sample_geometry, warp_of
from p2r.views.intensity import apply_appearance, draw_intensity, sample_appearance
from p2r.views.pair import ViewPair, WeakAndStrong, augment_labelled, augment_weakly_and_strongly, make_views

__all__ = [
    "Draws",
    "Labelled",
    "ViewPair",
    "WeakAndStrong",
    "apply_appearance",
    "apply_warp",
    "augment_labelled",
    "augment_weakly_and_strongly",
    "draw_boxes",
    "draw_intensity",
    "exchange",
    "inside_mask",
    "make_views",
    "sample_appearance",
    "sample_geometry",
    "warp_of",
]
