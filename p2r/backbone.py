"""What is published, and how it is loaded: a folder that needs no code of its own to be read.

    <name>/<version>/model-<sha256>.safetensors   weights
                     config-<sha256>.json         architecture, and what is done to a scan before the network sees it
                     README-<sha256>.md           model card
                     manifest.json                the files by name and digest, corpora, licence, origin; created last

A backbone gives features for every pixel; a model adds a segmentation head. Both are loaded after every digest has been
checked, from safetensors only: loading somebody's model never runs their code. `p2r.artefact` has the folder's rules.
"""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from p2r.artefact import (
    MAX_TEXT_BYTES,
    Artefact,
    BackboneManifest,
    FileEntry,
    Files,
    ModelManifest,
    Role,
    commit,
    entry_of,
    open_artefact,
)
from p2r.config import ModelConfig, Section
from p2r.data.preprocess import Frames, Planes, Preparation, frames_of, planes_of
from p2r.data.volume import Volume, read_volume
from p2r.documents import read_json
from p2r.errors import CheckpointError, DamagedError
from p2r.job import validated
from p2r.model.backbones import build_backbone
from p2r.model.heads import PrototypeHead, SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.reference import pinned
from p2r.storage import Storage, json_bytes
from p2r.tensors import MAX_HEADER_BYTES, check_fit, check_values, load_into, num_bytes_of, shapes_of, unallocated
from p2r.version import __version__, code_version

BACKBONE_FORMAT = "p2r-backbone/2"
MODEL_FORMAT = "p2r-model/2"
_MAX_CONFIG_DEPTH = 8


class ArtefactConfig(Section):
    """`config.json` of a backbone or model."""

    model: ModelConfig
    """Architecture."""
    preparation: Preparation
    """What is done to a scan before the network sees it."""
    classes: dict[int, Annotated[str, Field(max_length=200)]] = Field(default_factory=dict, max_length=1000)
    """Models only: name of each label value; 0 is the background."""
    num_prototypes: Annotated[tuple[PositiveInt, ...], Field(max_length=1001)] = ()
    """Models whose head compares features with prototypes: how many there are of each class, background first."""

    largest_component: bool = False
    """Models only: keep the largest connected part of each predicted class alone."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.classes) != list(range(1, len(self.classes) + 1)):
            raise ValueError("classes must number the labels 1, 2, ... without a gap")
        return self

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
        manifest: The artefact's manifest, with its digest under `sha256`, and `pin`: the reference that names this very backbone.
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

    def features(self, scan: str | Path | Volume | Tensor) -> Tensor:
        """Return features without a graph for gradients.

        Args:
            scan: A scan, of which `prepare` makes images, or images (B, C, *S) in [0, 1].

        Returns:
            (B, F, *S): of a scan (planes, F, H, W), or, of volumes, (frames, F, X, Y, Z).

        Raises:
            RefusedScan: if the scan cannot be used; its code says why.
        """
        images = scan if isinstance(scan, Tensor) else self.prepare(scan).images
        with torch.no_grad():
            features: Tensor = self(images.to(next(self.parameters()).device))
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


def load_backbone(url: str, *, sha256: str | None = None, key: str | None = None, device: str = "cpu") -> Backbone:
    """Load a published backbone, in evaluation mode.

    Args:
        url: `file://`, `s3://` or a path: the folder that holds `manifest.json`; or `URL@sha256:HEX`.
        sha256: The pin, if it is not in `url`: SHA-256 of `manifest.json`, which names every other file.
        key: Public key of who must have signed it: `ed25519:HEX`, or the path of a PEM file.
        device: Where the weights go.

    Raises:
        StorageError: if it is absent or damaged, another one than is pinned, or not signed by the key.
        CheckpointError: if it is not a backbone, or not one that this version can build.
    """
    artefact = open_artefact(pinned(url, sha256), format=_kind(BACKBONE_FORMAT), key=key)
    config = read_config(artefact)
    network = _loaded(artefact, config, is_model=False)
    return Backbone(network, config, artefact.facts()).to(device).eval()


def load_model(
    url: str, *, sha256: str | None = None, key: str | None = None, device: str = "cpu"
) -> tuple[Segmenter, ArtefactConfig, dict[str, Any]]:
    """Load a published segmentation model, in evaluation mode, with its configuration and manifest; as `load_backbone`."""
    artefact = open_artefact(pinned(url, sha256), format=_kind(MODEL_FORMAT), key=key)
    config = read_config(artefact)
    segmenter = _loaded(artefact, config, is_model=True)
    assert isinstance(segmenter, Segmenter)
    return segmenter.to(device).eval(), config, artefact.facts()


def verify_artefact(artefact: Artefact) -> None:
    """Check every file of a published folder: its digest, and that the weights fit the configuration.

    Raises:
        StorageError: A file is absent or damaged.
        CheckpointError: The configuration or the weights break a rule.
    """
    problems = artefact.problems()
    if problems:
        raise DamagedError(f"{artefact.storage.url} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    _loaded(artefact, read_config(artefact), is_model=isinstance(artefact.manifest, ModelManifest))


def read_config(artefact: Artefact) -> ArtefactConfig:
    """Read the configuration of a published folder: parsed from the very bytes that were hashed.

    Raises:
        InputError: It is damaged, or breaks a rule.
    """
    return _parsed_config(artefact.read("config"), where=artefact.storage.at(artefact.manifest.files.config.name))


def _parsed_config(content: bytes, *, where: str) -> ArtefactConfig:
    value = read_json(
        content, where=where, max_bytes=MAX_TEXT_BYTES, max_depth=_MAX_CONFIG_DEPTH, error=CheckpointError
    )
    return validated(ArtefactConfig, value, where=where)


def publish(
    storage: Storage,
    *,
    format: str,
    weights: Mapping[str, Tensor],
    config: ArtefactConfig,
    card: str,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Publish an artefact, and return its manifest's entries with `sha256`, `url`, `pin`, and `is_new`.

    Publishing the same thing again changes nothing, but for files that are damaged or missing: they are written again. Args:
        storage: The artefact's folder.
        format: `BACKBONE_FORMAT` or `MODEL_FORMAT`.
        weights: State of the network, float32.
        config: Architecture and preparation.
        card: README.md.
        facts: Further entries of the manifest: corpora, licence, job, step.

    Raises:
        CheckpointError: if something else is published there; or the weights do not fit the configuration, or are not finite.
    """
    is_model = format == MODEL_FORMAT
    network = _unallocated(config, is_model=is_model, where=storage.url)
    check_fit(shapes_of(weights), shapes_of(network.state_dict()), where=storage.url, of="the configuration")
    check_values(weights, where=storage.url)
    with tempfile.TemporaryDirectory(prefix="p2r-publish-") as name:
        files: dict[Role, Path] = {role: Path(name, role) for role in ("weights", "config", "card")}
        save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, files["weights"])
        files["config"].write_bytes(json_bytes(config.model_dump(mode="json")))
        files["card"].write_text(card, encoding="utf-8")
        entries: dict[Role, FileEntry] = {role: entry_of(role, local) for role, local in files.items()}
        values = {"format": format, "p2r_version": __version__, "code": code_version(), **facts}
        try:
            manifest = (ModelManifest if is_model else BackboneManifest)(files=Files(**entries), **values)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, problem["loc"]))
            raise CheckpointError(f"{storage.url} cannot be published: {key}: {problem['msg']}") from None
        artefact, is_new = commit(
            storage,
            manifest,
            files,
            is_same_config=lambda content: _parsed_config(content, where=storage.url) == config,
        )
    return {**artefact.facts(), "is_new": is_new}


def _kind(format: str) -> str:
    return format.partition("/")[0]


def _loaded(artefact: Artefact, config: ArtefactConfig, *, is_model: bool) -> nn.Module:
    """Build the network of an artefact and load its weights; nothing of their size is allocated before both fit."""
    where, entry = artefact.storage.url, artefact.manifest.files.weights
    network = _unallocated(config, is_model=is_model, where=where)
    room = num_bytes_of(network) + MAX_HEADER_BYTES
    if entry.num_bytes > room or entry.num_bytes < num_bytes_of(network):
        raise CheckpointError(
            f"the weights of {where} do not fit its config.json: they have {entry.num_bytes:,} bytes, the network "
            f"{num_bytes_of(network):,}"
        )
    load_into(network, artefact.read("weights"), where=f"{where}, {entry.name}")
    return network


def _unallocated(config: ArtefactConfig, *, is_model: bool, where: str) -> nn.Module:
    def build() -> nn.Module:
        network: nn.Module = build_backbone(config.model, dimensions=config.preparation.dimensions)
        return Segmenter(network, config.head()) if is_model else network

    return unallocated(build, where=where)
