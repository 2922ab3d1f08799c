"""Input and result of an export: a published backbone or model, and the facts about the written folder."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from p2r.artefact import BackboneManifest, ModelManifest, Provenance, Published, open_artefact
from p2r.backbone import ArtefactConfig, load_backbone, load_model
from p2r.config import ModelConfig
from p2r.data.preprocess import Preparation
from p2r.errors import InputError
from p2r.reference import parse_reference


@dataclass(frozen=True)
class Source:
    """A published backbone or model, loaded on the CPU in evaluation mode."""

    network: nn.Module
    """Image (B, C, *S) -> features (B, F, *S) or logits (B, K, *S)."""
    config: ArtefactConfig
    """Architecture, preparation and classes."""
    manifest: Published[Provenance]
    """The artefact's manifest."""
    card: str
    """Model card, as Markdown."""

    @property
    def is_model(self) -> bool:
        """True for a segmentation model, False for a backbone."""
        return bool(self.config.classes)

    @property
    def model(self) -> ModelConfig:
        """Architecture."""
        return self.config.model

    @property
    def preparation(self) -> Preparation:
        """Preprocessing of a scan."""
        return self.config.preparation

    @property
    def dimensions(self) -> int:
        """Axes of an image, 2 or 3."""
        return self.preparation.dimensions

    @property
    def num_outputs(self) -> int:
        """Channels of the output: classes with background, or features."""
        return len(self.config.classes) + 1 if self.is_model else self.model.feature_channels

    @property
    def outputs(self) -> dict[int, str]:
        """Name of each output channel."""
        if self.is_model:
            return {0: "background", **self.config.classes}
        return {number: f"feature {number}" for number in range(self.num_outputs)}

    @property
    def name(self) -> str:
        """Short name: the last two parts of the URL, name and version."""
        parts = [part for part in self.manifest.url.split("?")[0].rstrip("/").split("/") if part]
        return "-".join(parts[-2:])

    @property
    def noun(self) -> str:
        """`model` or `backbone`."""
        return "model" if self.is_model else "backbone"

    @property
    def validation_dice(self) -> float | None:
        """Mean Dice of a model on its validation patients; None if it is not known."""
        facts = self.manifest.facts
        found = (facts.validation or {}).get("dice_mean") if isinstance(facts, ModelManifest) else None
        return round(float(found), 4) if isinstance(found, int | float) else None

    @cached_property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.network.state_dict().values())

    def weights(self) -> dict[str, Tensor]:
        """Return the weights by name; of a model, the backbone's are below `backbone.` and the head's below `head.`."""
        prefix = "" if self.is_model else "backbone."
        return {f"{prefix}{name}": value.detach() for name, value in self.network.state_dict().items()}

    def images(self, *, batch: int = 1, blocks: int | None = None, seed: int = 0) -> Tensor:
        """Return random images (batch, C, *S) in [0, 1].

        Args:
            batch: Number of images.
            blocks: Side of the image, in units of the network's divisor; None: the size used in training.
            seed: Seed of the values.
        """
        side = self.preparation.image_size if blocks is None else self.model.size_divisor * blocks
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, self.model.in_channels, *[side] * self.dimensions, generator=generator)


@dataclass(frozen=True)
class Written:
    """Facts about an export, for the caller to show."""

    checks: tuple[str, ...]
    """Checks passed, with their figures."""
    commands: tuple[str, ...]
    """The next commands, in the other tool."""
    notes: tuple[str, ...] = ()
    """Limits that the user must know."""


def open_source(reference: str, *, key: str | None = None) -> Source:
    """Load a published backbone or model for an export.

    Args:
        reference: Its URL or path, with or without a pin.
        key: Public key that must have signed it; None: no signature required.

    Raises:
        StorageError: It is absent or damaged, differs from the pin, or is not signed by the key.
        CheckpointError: It is neither a backbone nor a model, or this version cannot build it.
    """
    artefact = open_artefact(parse_reference(reference), key=key)
    card = artefact.read("card").decode("utf-8", errors="replace") if artefact.manifest.files.card else ""
    if isinstance(artefact.manifest, BackboneManifest):
        backbone = load_backbone(artefact.pin)
        return Source(backbone.network.eval(), backbone.config, backbone.manifest, card)
    network, config, manifest = load_model(artefact.pin)
    return Source(network, config, manifest, card)


def largest_difference(found: Tensor, wanted: Tensor, *, at_most: float, what: str) -> float:
    """Return the largest absolute difference of two outputs, relative to the largest value if that is above 1.

    Raises:
        InputError: The shapes differ, or the difference exceeds `at_most`: the export would not be the same model.
    """
    if found.shape != wanted.shape:
        raise InputError(f"{what} has the shape {tuple(found.shape)}, p2r {tuple(wanted.shape)}: nothing was exported")
    difference = float((found - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
    if not difference <= at_most or not math.isfinite(difference):
        raise InputError(
            f"{what} differs from p2r by {difference:.2g}, at most {at_most:g} is allowed: nothing was exported"
        )
    return difference
