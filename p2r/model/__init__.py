"""Networks: an encoder-decoder with F channels per pixel, and the heads on top of it."""

from p2r.model.backbones import build_backbone
from p2r.model.heads import ProjectionHead, SegmentationHead
from p2r.model.pix2rep import Pix2Rep, Segmenter, read_at, read_pixels

__all__ = ["Pix2Rep", "ProjectionHead", "SegmentationHead", "Segmenter", "build_backbone", "read_at", "read_pixels"]
