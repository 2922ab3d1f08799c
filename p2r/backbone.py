"""Published backbones and models: saving, verifying, loading.

    <name>/<version>/model-<sha256>.safetensors   weights
                     config-<sha256>.json         architecture, and the preprocessing of a scan
                     README-<sha256>.md           model card
                     manifest.json                the files by name and digest, corpora, licence, origin; created last

A backbone returns features for every pixel; a model adds a segmentation head. Both are loaded only after every digest has
been checked, and only from safetensors: loading a stranger's model never runs code. See `p2r.artefact` for the folder.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self, overload

import torch
from numpy.typing import ArrayLike
from pydantic import AfterValidator, Field, PositiveInt, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from p2r.artefact import Artefact, Facts, Published, commit, open_artefact
from p2r.artefact_manifest import (
    MAX_TEXT_BYTES,
    BackboneManifest,
    FileEntry,
    Files,
    Manifest,
    ModelManifest,
    Provenance,
    Role,
    entry_of,
)
from p2r.config import ModelConfig, Section
from p2r.config.section import in_order, is_zero
from p2r.contrasts import describe
from p2r.data.contrasts import ScansLike, scans_from
from p2r.data.preprocess import Frames, Planes, Preparation, frames_of, planes_of
from p2r.documents import read_json
from p2r.errors import CheckpointError, DamagedError, InputError
from p2r.job import validated
from p2r.model.backbones import EncoderDecoder, build_backbone
from p2r.model.heads import PrototypeHead, SegmentationHead
from p2r.model.pix2rep import Segmenter
from p2r.reference import pinned
from p2r.storage import Storage, json_bytes
from p2r.tensors import (
    MAX_HEADER_BYTES,
    check_fit,
    check_values,
    load_into,
    num_bytes_of,
    read_shapes,
    read_tensors,
    shapes_of,
    unallocated,
)
from p2r.version import __version__, code_version

BACKBONE_FORMAT = "p2r-backbone/2"
MODEL_FORMAT = "p2r-model/2"
_MAX_CONFIG_DEPTH = 8


def _is_one(value: object) -> bool:
    """Return whether a number is 1; then its field is left out, as in configurations before it."""
    return value == 1


class ArtefactConfig(Section):
    """`config.json` of a backbone or model."""

    model: ModelConfig
    """Architecture."""
    preparation: Preparation
    """Preprocessing of a scan."""
    classes: Annotated[
        dict[int, Annotated[str, Field(max_length=200)]], Field(max_length=1000), AfterValidator(in_order)
    ] = Field(default_factory=dict)
    """Models only: name of each label value, in the order of the values; 0 is the background."""
    num_prototypes: Annotated[tuple[PositiveInt, ...], Field(max_length=20_000)] = ()
    """Models with a prototype head: number of prototypes of each class, background first; of several clusterings one after another."""
    prototype_clusterings: PositiveInt = Field(default=1, exclude_if=_is_one)
    """Models with a prototype head: number of clusterings, whose similarity maps are averaged."""
    prototype_smoothing_pixels: Annotated[float, Field(ge=0, le=20)] = Field(default=0.0, exclude_if=is_zero)
    """Models with a prototype head: standard deviation of the Gaussian filter on the similarity maps of the classes, pixels; 0: no
    filter."""
    prototypes_are_centred: bool = Field(default=False, exclude_if=is_zero)
    """Models with a prototype head: a centre is subtracted from unit vectors of features. False: a model from before this rule."""
    largest_component: bool = False
    """Models only: keep only the largest connected component of each predicted class."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.classes) != list(range(1, len(self.classes) + 1)):
            raise ValueError("classes must number the labels 1, 2, ... without a gap")
        if self.num_prototypes and len(self.num_prototypes) % self.prototype_clusterings:
            raise ValueError("num_prototypes must give as many numbers for every clustering")
        if self.model.contrasts != self.preparation.contrasts:
            raise ValueError(
                f"model.contrasts and preparation.contrasts must be equal, got {describe(self.model.contrasts)} and "
                f"{describe(self.preparation.contrasts)}"
            )
        return self

    def sha256(self) -> str:
        """Return a digest of the architecture and the preprocessing."""
        return hashlib.sha256(json_bytes(self.model_dump(mode="json"))).hexdigest()

    def head(self) -> nn.Module:
        """Build the segmentation head of a model, with new weights."""
        channels, dimensions = self.model.feature_channels, self.preparation.dimensions
        if self.num_prototypes:
            smoothing = self.prototype_smoothing_pixels / self.model.stride
            return PrototypeHead(
                channels,
                self.num_prototypes,
                smoothing_pixels=smoothing,
                is_centred=self.prototypes_are_centred,
                num_clusterings=self.prototype_clusterings,
            )
        return SegmentationHead(channels, len(self.classes) + 1, dimensions=dimensions)


class Backbone(nn.Module):
    """A published backbone: image (B, C, *S) in [0, 1] -> features (B, F, *S).

    A backbone trained at a coarser decoder level (`config.model.level`) returns features (B, F, *S / 2^level).

    Attributes:
        preparation: Preprocessing used by `prepare`.
        manifest: The artefact's manifest, by attribute and by key, plus its digest as `sha256`, and `pin`: the reference pinned
            to this backbone.
    """

    def __init__(self, network: nn.Module, config: ArtefactConfig, manifest: Published[Provenance]) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.preparation = config.preparation
        self.manifest = manifest

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of every pixel.

        Raises:
            ValueError: A side of the image is not divisible by `config.model.size_divisor` (16 by default).
        """
        features: Tensor = self.network(image)
        return features

    @overload
    def features(self, scan: ScansLike, *, levels: None = None) -> Tensor: ...

    @overload
    def features(self, scan: ScansLike, *, levels: Sequence[int]) -> list[Tensor]: ...

    def features(self, scan: ScansLike, *, levels: Sequence[int] | None = None) -> Tensor | list[Tensor]:
        """Return features without a gradient graph.

        Args:
            scan: Images (B, C, *S) in [0, 1] as a tensor; or a scan in any form that `prepare` takes and that is not a tensor.
            levels: Decoder levels whose maps to return, in this order. Level l has one vector per 2^l pixels along each axis.
                `config.model.level`: the backbone's own features. `config.model.depth`: the encoder's last maps. None: only the
                backbone's own features.

        Returns:
            (B, F, *S). For a scan: (planes, F, H, W), or, for 3D backbones, (frames, F, X, Y, Z). With `levels`: a list of maps, each
            with the channels of its level.

        Raises:
            InputError: A level does not exist in this backbone.
            RefusedScan: The scan cannot be used; the code gives the reason.
        """
        images = scan if isinstance(scan, Tensor) else self.prepare(scan).images
        with torch.no_grad():
            images = images.to(next(self.parameters()).device)
            if levels is None:
                features: Tensor = self(images)
                return features
            if not isinstance(self.network, EncoderDecoder):
                raise InputError(f"{type(self.network).__name__} has no decoder levels: leave levels out")
            return self.network.levels(images, levels)

    def prepare(
        self,
        scan: ScansLike,
        *,
        spacing_mm: float | Sequence[float] | None = None,
        affine: ArrayLike | None = None,
    ) -> Planes | Frames:
        """Convert a scan to images as in training: the same orientation, spacing, size and intensities.

        Returns planes cropped about their centre or, for 3D backbones, frames cropped about the middle.

        Args:
            scan: A path or URL of NIfTI, a folder of DICOM, a `Volume`, or an image of nibabel, MONAI (MetaTensor) or TorchIO. Or
                an array or tensor (X, Y, Z) or (X, Y, Z, T). For a backbone of several contrasts: these by name, as in
                `{"flair": ..., "t1": ...}`; some may be missing, and scans on other grids are resampled to that of the first.
            spacing_mm: For an array without affine: voxel size, mm; its axes then point to the right, anterior and superior.
            affine: For an array: (4, 4), voxel -> mm in RAS.

        Raises:
            InputError: The scan has no such form, or no voxel size.
            RefusedScan: The scan cannot be used; the code gives the reason.
        """
        scans = scans_from(scan, spacing_mm=spacing_mm, affine=affine)
        make = frames_of if self.preparation.dimensions == 3 else planes_of
        return make(scans, preparation=self.preparation, size=self.preparation.image_size)


def load_backbone(url: str, *, sha256: str | None = None, key: str | None = None, device: str = "cpu") -> Backbone:
    """Load a published backbone, in evaluation mode.

    Args:
        url: Folder that holds `manifest.json`: `file://`, `s3://` or a path; or `URL@sha256:HEX`.
        sha256: The pin, if it is not in `url`: SHA-256 of `manifest.json`, which names every other file.
        key: Public key that must have signed the manifest: `ed25519:HEX`, or the path of a PEM file.
        device: Device for the weights.

    Raises:
        StorageError: The artefact is absent or damaged, differs from the pin, or is not signed by the key.
        CheckpointError: It is not a backbone, or not one that this version can build.
    """
    artefact = open_artefact(pinned(url, sha256), format=_format_kind(BACKBONE_FORMAT), key=key)
    config = read_config(artefact)
    network = _load_network(artefact, config, is_model=False)
    return Backbone(network, config, _published(artefact, BackboneManifest)).to(device).eval()


def load_model(
    url: str, *, sha256: str | None = None, key: str | None = None, device: str = "cpu"
) -> tuple[Segmenter, ArtefactConfig, Published[ModelManifest]]:
    """Load a published segmentation model in evaluation mode, with configuration and manifest. Arguments as in `load_backbone`."""
    artefact = open_artefact(pinned(url, sha256), format=_format_kind(MODEL_FORMAT), key=key)
    config = read_config(artefact)
    segmenter = _load_network(artefact, config, is_model=True)
    assert isinstance(segmenter, Segmenter)
    return segmenter.to(device).eval(), config, _published(artefact, ModelManifest)


def _published(artefact: Artefact, kind: type[Facts], *, is_new: bool = False) -> Published[Facts]:
    assert isinstance(artefact.manifest, kind)
    return Published(artefact.storage.url, artefact.sha256, artefact.manifest, is_new)


def verify_artefact(artefact: Artefact) -> None:
    """Check every file of a published folder: its digest, and that the weights fit the configuration.

    Raises:
        StorageError: A file is absent or damaged.
        CheckpointError: The configuration or the weights break a rule.
    """
    problems = artefact.problems()
    if problems:
        raise DamagedError(f"{artefact.storage.url} is damaged:\n" + "\n".join(f"  {problem}" for problem in problems))
    _load_network(artefact, read_config(artefact), is_model=isinstance(artefact.manifest, ModelManifest))


def check_pulled(folder: Path, artefact: Artefact) -> None:
    """Check that the weights of a folder whose digests are right fit its configuration, by names and shapes; read no values.

    Args:
        folder: Copy of the artefact's files.
        artefact: The artefact.

    Raises:
        CheckpointError: The configuration or the weights break a rule.
    """
    local = Artefact(Storage(str(folder)), artefact.manifest, artefact.content)
    where, entry = artefact.storage.url, artefact.manifest.files.weights
    network = _build_unallocated(read_config(local), is_model=isinstance(artefact.manifest, ModelManifest), where=where)
    with (folder / entry.name).open("rb") as file:
        start = file.read(MAX_HEADER_BYTES)
    where = f"{where}, {entry.name}"
    check_fit(read_shapes(start, where=where), shapes_of(network.state_dict()), where=where, of="its config.json")


def read_config(artefact: Artefact) -> ArtefactConfig:
    """Read the configuration of a published folder, parsed from the same bytes that were hashed.

    Raises:
        InputError: The configuration is damaged or breaks a rule.
    """
    return _parse_config(artefact.read("config"), where=artefact.storage.at(artefact.manifest.files.config.name))


def _parse_config(content: bytes, *, where: str) -> ArtefactConfig:
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
    facts: Mapping[str, object],
    tensors: Mapping[Role, Mapping[str, Tensor]] | None = None,
    documents: Mapping[Role, bytes] | None = None,
) -> Published[Manifest]:
    """Publish an artefact, and return its manifest.

    Publishing an equal artefact again only rewrites files that are damaged or missing.

    Args:
        storage: The artefact's folder.
        format: `BACKBONE_FORMAT` or `MODEL_FORMAT`.
        weights: State of the network, float32.
        config: Architecture and preprocessing.
        card: Content of README.md.
        facts: Further entries of the manifest: corpora, licence, job, step.
        tensors: Further weights in files of their own, float32: `head`, `unaveraged`.
        documents: Content of further files: `metrics`, `picture`.

    Raises:
        CheckpointError: A different artefact is published there, or the weights are not finite or do not fit the configuration.
    """
    is_model = format == MODEL_FORMAT
    network = _build_unallocated(config, is_model=is_model, where=storage.url)
    check_fit(shapes_of(weights), shapes_of(network.state_dict()), where=storage.url, of="the configuration")
    check_values(weights, where=storage.url)
    with tempfile.TemporaryDirectory(prefix="p2r-publish-") as name:
        saved: dict[Role, dict[str, Tensor]] = {
            role: {key: value.detach().cpu().contiguous() for key, value in of_role.items()}
            for role, of_role in {"weights": weights, **(tensors or {})}.items()
        }
        contents: dict[Role, bytes] = {
            "config": json_bytes(config.model_dump(mode="json")),
            "card": card.encode(),
            **(documents or {}),
        }
        files: dict[Role, Path] = {role: Path(name, role) for role in (*saved, *contents)}
        for role, of_role in saved.items():
            save_file(of_role, files[role], metadata={"format": "pt"})  # other libraries ask for it
        for role, content in contents.items():
            files[role].write_bytes(content)
        entries: dict[Role, FileEntry] = {role: entry_of(role, local) for role, local in files.items()}
        values = {"format": format, "p2r_version": __version__, "code": code_version(), **facts}
        try:
            manifest = (ModelManifest if is_model else BackboneManifest).model_validate(
                {**values, "files": Files(**entries)}
            )
        except ValidationError as error:
            problem = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, problem["loc"]))
            raise CheckpointError(f"{storage.url} cannot be published: {key}: {problem['msg']}") from None
        artefact, is_new = commit(
            storage,
            manifest,
            files,
            is_same={
                "config": lambda content: _parse_config(content, where=storage.url) == config,
                **{role: _equality(of_role, where=storage.url) for role, of_role in saved.items()},
            },
        )
    return _published(artefact, Manifest, is_new=is_new)


def _equality(wanted: Mapping[str, Tensor], *, where: str) -> Callable[[bytes], bool]:
    """Return a function that tells whether the content of a file holds these tensors."""
    return lambda content: _are_equal(read_tensors(content, where=where), wanted)


def _are_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], value) for name, value in wanted.items())


def _format_kind(format: str) -> str:
    return format.partition("/")[0]


def _load_network(artefact: Artefact, config: ArtefactConfig, *, is_model: bool) -> nn.Module:
    """Build the network of an artefact and load its weights; memory is allocated only after both are known to fit."""
    where, entry = artefact.storage.url, artefact.manifest.files.weights
    network = _build_unallocated(config, is_model=is_model, where=where)
    room = num_bytes_of(network) + MAX_HEADER_BYTES
    if entry.num_bytes > room or entry.num_bytes < num_bytes_of(network):
        raise CheckpointError(
            f"the weights of {where} do not fit its config.json: they have {entry.num_bytes:,} bytes, the network "
            f"{num_bytes_of(network):,}"
        )
    load_into(network, artefact.read("weights"), where=f"{where}, {entry.name}")
    return network


def _build_unallocated(config: ArtefactConfig, *, is_model: bool, where: str) -> nn.Module:
    def build() -> nn.Module:
        network: nn.Module = build_backbone(config.model, dimensions=config.preparation.dimensions)
        return Segmenter(network, config.head()) if is_model else network

    return unallocated(build, where=where)
