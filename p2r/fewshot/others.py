"""A frozen network of another tool -> a backbone for the mode `other_probe`.

Its pretraining data are not known to p2r. So its rows are labelled: validation and test patients may be among them.
"""

import hashlib
import importlib

import torch
from torch import Tensor, nn

from p2r.artefact import Provenance, Published
from p2r.backbone import ArtefactConfig, Backbone
from p2r.config import ModelConfig, OtherConfig
from p2r.data.preprocess import Preparation
from p2r.errors import DataError
from p2r.storage import json_bytes


def load_other(config: OtherConfig) -> Backbone:
    """Build the network, and check the features of an empty image.

    Args:
        config: Section `finetune.other`.

    Returns:
        A backbone in evaluation mode. `manifest.sha256` is a digest of the section and of the weights.

    Raises:
        DataError: The function or its network cannot be used.
    """
    where = f"finetune.other {config.name} ({config.build})"
    module_name, _, function_name = config.build.partition(":")
    try:
        network = getattr(importlib.import_module(module_name), function_name)(**config.options)
    except Exception as error:  # code of the job's author may raise anything
        raise DataError(f"{where} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise DataError(f"{where} returned {type(network).__name__}; it must return a torch.nn.Module")
    network.eval().requires_grad_(False)
    features = _features_of_empty_image(network, config, where)
    image = config.image
    preparation = Preparation(
        dimensions=image.dimensions,
        intensity_percentiles=image.intensity_percentiles,
        spacing_mm=image.spacing_mm,
        image_size=image.size,
    )
    # Only the number of features is read from the model section: the network is not one of p2r's.
    own = ArtefactConfig(model=ModelConfig(feature_channels=features.shape[1]), preparation=preparation)
    return Backbone(network, own, Published(config.build, _digest(network, config), Provenance()))


def _features_of_empty_image(network: nn.Module, config: OtherConfig, where: str) -> Tensor:
    size = [config.image.size] * config.image.dimensions
    try:
        with torch.inference_mode():
            features = network(torch.zeros(1, 1, *size))
    except Exception as error:
        raise DataError(
            f"{where} refuses an image (1, 1, {', '.join(map(str, size))}): {type(error).__name__}: {error}; change image, or the function"
        ) from error
    sides = "H, W" if len(size) == 2 else "X, Y, Z"
    if not isinstance(features, Tensor) or features.ndim != len(size) + 2 or len(features) != 1:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise DataError(f"{where} must return features (B, F, {sides}), or on a coarser grid; got {got}")
    if not torch.isfinite(features).all():
        raise DataError(f"{where} returns NaN or infinity for an empty image")
    return features


def _digest(network: nn.Module, config: OtherConfig) -> str:
    digest = hashlib.sha256(json_bytes(config.model_dump(mode="json")))
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(name.encode() + str(value.dtype).encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
