"""p2r: a pixel-level foundation model for MRI, pretrained without labels.

    backbone = p2r.load_backbone("s3://bucket/backbones/brain/1")
    features = backbone.features("scan.nii.gz")            # (planes, F, H, W), no graph

    model = p2r.load_model("s3://bucket/models/liver/all")
    model.predict("scan.nii.gz").to_filename("segmentation.nii.gz")

    made = p2r.run("mine/job.yaml", pretrain__steps=20)    # in this process, without Ray
    rows = p2r.open_report(made["storage"]).rows

Importing the package is cheap: torch is loaded on first use of a name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from p2r.version import __version__

if TYPE_CHECKING:
    from p2r.backbone import Backbone, load_backbone
    from p2r.evaluate.models import Model, load_model
    from p2r.pipeline.local import run
    from p2r.report.runs import open_report

__all__ = ["Backbone", "Model", "__version__", "load_backbone", "load_model", "open_report", "run"]

_MODULES = {
    "Backbone": "p2r.backbone",
    "load_backbone": "p2r.backbone",
    "Model": "p2r.evaluate.models",
    "load_model": "p2r.evaluate.models",
    "open_report": "p2r.report.runs",
    "run": "p2r.pipeline.local",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        try:
            return getattr(import_module(_MODULES[name]), name)
        except ModuleNotFoundError as error:
            from p2r.errors import missing_package

            if (lacking := missing_package(error, what=f"p2r.{name}")) is None:
                raise
            raise ModuleNotFoundError(str(lacking), name=error.name) from error
    raise AttributeError(f"module 'p2r' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
