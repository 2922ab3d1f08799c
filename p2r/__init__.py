"""p2r: a pixel-level foundation model for MRI, pretrained without labels.

    backbone = p2r.load_backbone("s3://bucket/backbones/brain/1")
    features = backbone(backbone.prepare("scan.nii.gz").images)   # (planes, F, H, W)

Importing the package is cheap: torch is loaded with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

from p2r.version import __version__

if TYPE_CHECKING:
    from p2r.backbone import load_backbone

__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from p2r.backbone import load_backbone

        return load_backbone
    raise AttributeError(f"module 'p2r' has no attribute '{name}'")
