"""What is published, and how it is loaded: a folder of four files that needs no code of its own to be read.

    <name>/<version>/model.safetensors   weights
                     config.json         architecture, and what is done to a scan before the network sees it
                     README.md           model card
                     manifest.json       sha256 of each file, corpus, licence, origin; written last

A backbone gives features for every pixel; a model adds a segmentation head. Both are loaded after every digest has been
checked, from safetensors only: loading somebody's model never runs their code.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from p2r.config import ModelConfig, Section
from p2r.data.preprocess import Frames, Planes, Preparation, frames_of, planes_of
from p2r.data.volume import Volume, read_volume
from p2r.errors import CheckpointError, StorageError
from p2r.job import validated
from p2r.model.backbones import build_backbone
from p2r.model.heads import PrototypeHead, SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.storage import Storage, file_sha256, json_bytes
from p2r.version import __version__, code_version

BACKBONE_FORMAT = "p2r-backbone/1"
MODEL_FORMAT = "p2r-model/1"


class ArtefactConfig(Section):
    """`config.json` of a backbone or model."""

    model: ModelConfig
    """Architecture."""
    preparation: Preparation
    """What is done to a scan before the network sees it."""
    classes: dict[int, str] = Field(default_factory=dict)
    """Models only: name of each label value; 0 is the background."""
    num_prototypes: tuple[int, ...] = ()
    """Models whose head compares features with prototypes: how many there are of each class, background first."""

    largest_component: bool = False
    """Models only: keep the largest connected part of each predicted class alone."""

    def sha256(self) -> str:
        """Return a digest of the network's shape and of what is done to a scan."""
        return hashlib.sha256(json_bytes(self.model_dump(mode="json"))).hexdigest()

    def head(self) -> nn.Module:
        """Build the segmentation head of a model, with new weights."""
        channels, dimensions = self.model.feature_channels, self.preparation.dimensions
        if self.num_prototypes:
            return PrototypeHead(channels, self.num_prototypes)
        return SegmentationHead(channels, len(self.classes) + 1, dimensions=dimensions)


class Backbone(nn.Module):
    """A published backbone: image (B, C, *S) in [0, 1] -> features (B, F, *S).

    One that was trained at a coarser level of its decoder (`config.model.level`) gives features (B, F, *S / 2^level).

    Attributes:
        preparation: What `prepare` does to a scan.
        manifest: The artefact's manifest, with its digest under `sha256`.
    """

    def __init__(self, network: nn.Module, config: ArtefactConfig, manifest: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.preparation = config.preparation
        self.manifest = manifest

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of every pixel.

        Raises:
            ValueError: for a side of the image that `config.model.size_divisor` does not divide (16 for the default).
        """
        features: Tensor = self.network(image)
        return features

    def prepare(self, scan: str | Path | Volume) -> Planes | Frames:
        """Make of a scan the images that training saw: orientation, spacing, size and intensities alike.

        Planes, about their centre; or, for a backbone of volumes, each frame about the middle.

        Raises:
            RefusedScan: if the file cannot be used; its code says why.
        """
        volume = scan if isinstance(scan, Volume) else read_volume(scan)
        make = frames_of if self.preparation.dimensions == 3 else planes_of
        return make(volume, preparation=self.preparation, size=self.preparation.image_size)


def load_backbone(url: str, *, device: str = "cpu") -> Backbone:
    """Load a published backbone, in evaluation mode.

    Args:
        url: `file://`, `s3://` or a path: the folder that holds `manifest.json`.
        device: Where the weights go.

    Raises:
        StorageError: if it is absent or damaged.
        CheckpointError: if it is not a backbone, or not one that this version can build.
    """
    manifest, config, weights = _read(Storage(url), BACKBONE_FORMAT)
    network = build_backbone(config.model, dimensions=config.preparation.dimensions)
    _load_weights(network, weights, url)
    return Backbone(network, config, manifest).to(device).eval()


def load_model(url: str, *, device: str = "cpu") -> tuple[Segmenter, ArtefactConfig, dict[str, Any]]:
    """Load a published segmentation model, in evaluation mode, with its configuration and manifest."""
    manifest, config, weights = _read(Storage(url), MODEL_FORMAT)
    segmenter = Segmenter(build_backbone(config.model, dimensions=config.preparation.dimensions), config.head())
    _load_weights(segmenter, weights, url)
    return segmenter.to(device).eval(), config, manifest


def publish(
    storage: Storage,
    *,
    format: str,
    weights: Mapping[str, Tensor],
    config: ArtefactConfig,
    card: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write an artefact, manifest last, and return its manifest.

    Publishing the same thing again changes nothing. Args:
        storage: The artefact's folder.
        format: `BACKBONE_FORMAT` or `MODEL_FORMAT`.
        weights: State of the network, fp32.
        config: Architecture and preparation.
        card: README.md.
        facts: Further entries of the manifest: corpus, licence, job, step.

    Raises:
        CheckpointError: if other weights are already published there.
    """
    with tempfile.TemporaryDirectory(prefix="p2r-publish-") as name:
        folder = Path(name)
        save_file(
            {key: value.detach().cpu().float().contiguous() for key, value in weights.items()},
            folder / "model.safetensors",
        )
        (folder / "config.json").write_bytes(json_bytes(config.model_dump(mode="json")))
        (folder / "README.md").write_text(card, encoding="utf-8")
        files = {
            file.name: {"sha256": file_sha256(file), "num_bytes": file.stat().st_size}
            for file in sorted(folder.iterdir())
        }
        manifest = {"format": format, "files": files, "p2r_version": __version__, "code": code_version(), **facts}
        if storage.exists("manifest.json"):
            published = storage.read_json("manifest.json")
            if published["files"]["model.safetensors"] != files["model.safetensors"]:
                raise CheckpointError(
                    f"{storage.url} is already published with other weights, and what is published never changes: "
                    "choose another publish.version"
                )
            return _with_digest(storage)
        for file in files:
            storage.upload(folder / file, file)
        storage.write_json("manifest.json", manifest)
    return _with_digest(storage)


def _with_digest(storage: Storage) -> dict[str, Any]:
    content = storage.read_bytes("manifest.json")
    return {**storage.read_json("manifest.json"), "sha256": hashlib.sha256(content).hexdigest(), "url": storage.url}


def _read(storage: Storage, format: str) -> tuple[dict[str, Any], ArtefactConfig, Path]:
    if not storage.exists("manifest.json"):
        raise StorageError(
            f"{storage.url} holds no manifest.json: give the folder of one published version, such as backbones/NAME/1"
        )
    manifest = _with_digest(storage)
    if manifest.get("format") != format:
        raise CheckpointError(f"{storage.url} has format {manifest.get('format')!r}, needed is {format!r}")
    paths: dict[str, Path] = {}
    for name in ("model.safetensors", "config.json"):
        entry = manifest["files"][name]
        paths[name] = storage.local(name, sha256=entry["sha256"], num_bytes=entry["num_bytes"])
        if file_sha256(paths[name]) != entry["sha256"]:
            raise StorageError(
                f"{storage.at(name)} does not have the sha256 of its manifest: it is damaged; publish it again"
            )
    config = validated(ArtefactConfig, storage.read_json("config.json"), where=storage.at("config.json"))
    return manifest, config, paths["model.safetensors"]


def _load_weights(network: nn.Module, path: Path, url: str) -> None:
    try:
        network.load_state_dict(load_file(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(f"the weights of {url} do not fit its config.json: {error}") from None
