"""Table of the formats of other tools, and the networks that each can hold; read by jobs before anything is trained.

A new format is an entry here, and a module of `p2r.export` with a function `write(source, folder)`.
"""

from dataclasses import dataclass
from typing import Literal

ExportName = Literal["monai", "onnx", "huggingface", "nnunet"]

_MONAI = ("basic_unet", "unet", "dynunet", "residual_dynunet", "swin_unetr")
_NNUNET = ("dynunet", "residual_encoder_unet")


@dataclass(frozen=True)
class Export:
    """A format of other tools."""

    module: str
    """Module with the function `write`."""
    title: str
    """Description of the format, for people."""
    extra: str | None = None
    """Extra of p2r that installs its packages; None: the core has them."""
    networks: tuple[str, ...] | None = None
    """Networks that the tool has, with their finest level only; None: any network, at any level."""
    is_instance_normalised: bool = False
    """True if the tool's networks have instance normalisation only."""
    takes_contrasts: bool = True
    """False if images with several contrasts cannot be read."""


EXPORTS: dict[ExportName, Export] = {
    "monai": Export("p2r.export.monai_bundle", "MONAI bundle", networks=_MONAI, takes_contrasts=False),
    "onnx": Export("p2r.export.onnx_file", "ONNX file", "onnx"),
    "huggingface": Export("p2r.export.hub_folder", "Hugging Face folder"),
    "nnunet": Export("p2r.export.nnunet", "nnU-Net checkpoint", networks=_NNUNET, is_instance_normalised=True),
}


def reason_against(to: ExportName, *, network: str, level: int, normalisation: str, num_contrasts: int) -> str | None:
    """Return why a tool cannot hold a network, with the way out; None if it can.

    Args:
        to: Format.
        network: `model.name`.
        level: `model.level`.
        normalisation: `model.normalisation`.
        num_contrasts: `model.in_channels`.
    """
    export = EXPORTS[to]
    if export.networks is None:
        return None
    way_out = "the format onnx holds any network"
    if network not in export.networks:
        return f"the tool has no {network}, but {', '.join(export.networks)}; {way_out}"
    if level:
        return f"the network ends at level {level} of the decoder, and the tool's networks at level 0; {way_out}"
    if export.is_instance_normalised and normalisation != "instance":
        return f"the tool's networks have instance normalisation, this one has {normalisation}; {way_out}"
    if not export.takes_contrasts and num_contrasts > 1:
        return f"the network reads {num_contrasts} contrasts, of which some may be missing, and the tool's reads one; {way_out}"
    return None
