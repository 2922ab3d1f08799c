"""Views -> corresponding points; embeddings of corresponding points -> a scalar to minimise."""

from p2r.loss.barlow import barlow_twins
from p2r.loss.info_nce import SameImage, info_nce
from p2r.loss.points import corresponding_points

__all__ = ["SameImage", "barlow_twins", "corresponding_points", "info_nce"]
