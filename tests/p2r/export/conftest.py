"""Published backbones and models of every network, tiny and with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from p2r.backbone import BACKBONE_FORMAT, MODEL_FORMAT, ArtefactConfig, publish
from p2r.config import ModelConfig
from p2r.data.preprocess import Preparation
from p2r.model.backbones import build_backbone
from p2r.model.pix2rep import Segmenter
from p2r.storage import Storage

NETWORKS: dict[str, dict[str, Any]] = {
    "basic_unet": {"channels": (4, 4, 8, 8, 8)},
    "unet": {"channels": (4, 8, 8)},
    "dynunet": {"channels": (4, 8, 8)},
    "residual_dynunet": {"channels": (4, 8, 8), "normalisation": "group", "groups": 2},
    "residual_encoder_unet": {"channels": (4, 8, 8), "blocks": (1, 2, 2)},
    "swin_unetr": {"channels": (12, 24, 48, 96, 192)},
}


@pytest.fixture
def publish_toy(tmp_path: Path) -> Callable[..., str]:
    """A function that publishes a tiny backbone or model of one network, with random weights."""

    def make(name: str, *, dimensions: int = 2, kind: str = "backbone", **more: Any) -> str:
        torch.manual_seed(0)
        model = ModelConfig(
            **{
                "name": name,
                "feature_channels": 6,
                "head_channels": 4,
                "embedding_channels": 4,
                **NETWORKS[name],
                **more,
            }
        )
        size = 64 if name == "swin_unetr" else 32
        preparation = Preparation(dimensions=dimensions, spacing_mm=2.0, image_size=size)
        facts: dict[str, Any] = {"model": model, "preparation": preparation}
        if kind != "backbone":
            facts |= {"classes": {1: "A", 2: "B"}, "largest_component": kind == "model"}
        if kind == "prototypes":
            facts["num_prototypes"], facts["prototype_smoothing_pixels"] = (3, 2, 1), 1.0
            facts["prototypes_are_centred"] = True
        config = ArtefactConfig(**facts)
        network: Any = build_backbone(model, dimensions=dimensions)
        if kind != "backbone":
            network = Segmenter(network, config.head())
        if kind == "prototypes":
            torch.nn.init.normal_(network.head.prototypes)
            torch.nn.init.normal_(network.head.centre, std=0.1)
        url = str(tmp_path / "published" / f"{name}-{dimensions}-{kind}" / "1")
        publish(
            Storage(url),
            format=BACKBONE_FORMAT if kind == "backbone" else MODEL_FORMAT,
            weights=network.state_dict(),
            config=config,
            card="# toy\n",
            facts={"licence": "CC0-1.0", "corpora": []},
        )
        return url

    return make
