"""Table of the objectives over pixel pairs, one entry each: loss, memory, traffic and operations.

A new objective is one function in `p2r.loss`, its name in `LossConfig.name`, and one entry in `OBJECTIVES`. The step computes with the
entry and the plan counts with it, so an objective without an entry can be neither trained nor planned.

Letters: W ranks, n pixel pairs of a rank, N of all, E embedding channels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from p2r.config import LossConfig, PretrainConfig
from p2r.engine.build import DTYPES
from p2r.errors import InputError
from p2r.loss import Findings, SameImage, barlow_twins, info_nce, info_nce_within_images, without_kernels
from p2r.loss.contrast import PANEL
from p2r.loss.tiles import TILE, num_panels
from p2r.loss.within_image import images_at_once

COLDEST = 0.013
"""Smallest learnt temperature. Below, no static shift serves more than 10^8 candidates, and GPUs cannot use the loss kernels."""
FP32_BYTES = 4
_PANEL_ON_CUDA = 16_384  # rows per panel of column sums in the kernels
_SPLIT_ON_CUDA, _MOST_SPLITS_ON_CUDA, _PARTIAL_ON_CUDA = 16_384, 8, 2**28  # for the kernels' gradients


@dataclass(frozen=True)
class PixelPairs:
    """Embeddings of the pixel pairs of one rank, or of one of its micro-batches."""

    queries: Tensor
    """(n, E)."""
    keys: Tensor
    """(n, E)."""
    weights: Tensor
    """(n,) 0 for pairs without content."""
    image: Tensor
    """(n,) sample that each pair comes from."""
    position_mm: Tensor
    """(n, 2 or 3) position in the sample."""
    contrasts: Tensor | None = None
    """(n,) number of the pair of contrasts, from `p2r.views.contrasts.number_pairs`; None: images of one contrast."""


Loss = Callable[[PixelPairs, LossConfig, "float | Tensor", Findings | None, dict[str, Tensor] | None], Tensor]
"""Pairs, configuration, temperature, findings that collect invalid values, parts of the loss by name -> the loss over all ranks."""


@dataclass(frozen=True)
class LossMemory:
    """Memory of the loss on one rank."""

    saved_bytes: int
    """Kept for the backward pass."""
    peak_bytes: int


@dataclass(frozen=True)
class Objective:
    """One objective: the function, and the counts that a plan needs."""

    loss: Loss
    memory: Callable[[PretrainConfig, int, int, str], LossMemory]
    """Configuration, n, W and device -> memory."""
    traffic: Callable[[PretrainConfig, int, int, str], int]
    """Configuration, n, W and device -> bytes that a rank sends in one evaluation; W is at least 2."""
    products: Callable[[PretrainConfig, int, int], float] | None = None
    """Configuration, N and W -> operations in units of n N E, if kernels compute the objective by matrix products; None: they do not."""


def objective_of(config: LossConfig) -> Objective:
    """Return the objective of a configuration.

    Raises:
        InputError: `OBJECTIVES` has no entry for it.
    """
    name = "info_nce_within_images" if config.negatives == "image" else config.name
    if name not in OBJECTIVES:
        raise InputError(f"pretrain.loss.name {name!r} has no entry in p2r.engine.objectives.OBJECTIVES")
    return OBJECTIVES[name]


def pixel_pair_loss(
    pairs: PixelPairs,
    config: LossConfig,
    *,
    temperature: float | Tensor,
    findings: Findings | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the objective of `config` over the pixel pairs of all ranks.

    Args:
        pairs: Pixel pairs of this rank.
        config: Configuration of the objective.
        temperature: tau of InfoNCE.
        findings: Collects invalid values, instead of waiting for the device; see `info_nce`.
        parts: Receives the parts of the loss.
    """
    return objective_of(config).loss(pairs, config, temperature, findings, parts)


def explain_missing_kernels(config: PretrainConfig, *, device: torch.device) -> str | None:
    """Return why GPUs will compute the loss without its kernels, and the way out; None if they use them or need none.

    Args:
        config: Configuration of the run.
        device: The GPU. A CPU represents an H100.
    """
    loss = config.loss
    if objective_of(loss).products is None:
        return None
    return without_kernels(
        DTYPES[config.precision],
        config.model.embedding_channels,
        temperature=COLDEST if loss.learn_temperature else loss.temperature,
        num_pairs=config.global_batch * loss.pixel_pairs_per_image,
        device=device,
        allows_tf32=config.precision == "tf32",
    )


def has_kernels(config: PretrainConfig, device: str) -> bool:
    """Return whether a device like an H100 computes the loss with its kernels.

    Without Triton on this machine, only the precision is known.
    """
    if device != "cuda" or config.precision == "fp32":
        return False
    return find_spec("triton") is None or explain_missing_kernels(config, device=torch.device("cpu")) is None


def _product_bytes(config: PretrainConfig, device: str) -> int:
    return DTYPES[config.precision].itemsize if has_kernels(config, device) else FP32_BYTES


def _num_panels(rows: int, *, on_kernels: bool) -> int:
    """Return the number of groups into which the anchors are split for the sums over them."""
    return math.ceil(rows / _PANEL_ON_CUDA) if on_kernels else num_panels(rows)


def _agreement_bytes(world_size: int, device: str) -> int:
    """Return the bytes by which ranks on CPUs first exchange 18 numbers about the next operation."""
    return 0 if device == "cuda" else (world_size - 1) * 18 * 8


def _reduced_bytes(num_bytes: int, world_size: int) -> int:
    """Return the bytes that a rank sends to sum that number of bytes over all ranks."""
    return round(2 * (world_size - 1) / world_size * num_bytes)


def _info_nce_loss(
    pairs: PixelPairs,
    config: LossConfig,
    temperature: float | Tensor,
    findings: Findings | None,
    parts: dict[str, Tensor] | None,
) -> Tensor:
    exclude = None
    if config.exclude_within_mm is not None:
        exclude = SameImage(pairs.image, pairs.position_mm, config.exclude_within_mm)
    return info_nce(
        pairs.queries,
        pairs.keys,
        temperature=temperature,
        form=config.form,
        decoupled=config.decoupled,
        weights=pairs.weights,
        exclude=exclude,
        exchange=config.exchange,
        findings=findings,
        parts=parts,
    )


def _info_nce_memory(config: PretrainConfig, rows: int, world_size: int, device: str) -> LossMemory:
    loss, tower = config.loss, rows * config.model.embedding_channels
    on_kernels, product = has_kernels(config, device), _product_bytes(config, device)
    tile = 0 if on_kernels else FP32_BYTES * TILE**2
    others = tower * world_size if world_size > 1 and loss.exchange == "all_gather" else 0
    # Rows divided by their largest number, normalised rows; both again in the dtype of products; rows of all ranks.
    saved = 2 * FP32_BYTES * 2 * tower + 2 * product * (tower if product != FP32_BYTES else 0) + 2 * product * others
    forward = max(
        product * others,
        tile + FP32_BYTES * _num_panels(rows, on_kernels=on_kernels) * rows * world_size,
    )
    travelling = 4 * product * tower if loss.exchange == "ring" and world_size > 1 else 0
    splits = min(_MOST_SPLITS_ON_CUDA, math.ceil(rows * world_size / _SPLIT_ON_CUDA)) if on_kernels else 0
    parts = min(splits * FP32_BYTES * tower, max(_PARTIAL_ON_CUDA, FP32_BYTES * tower))
    backward = 2 * tile + 2 * FP32_BYTES * tower + FP32_BYTES * max(others + tower, 2 * tower) + travelling + parts
    return LossMemory(saved, saved + max(forward, backward))


def _info_nce_traffic(config: PretrainConfig, rows: int, world_size: int, device: str) -> int:
    loss, channels, others = config.loss, config.model.embedding_channels, world_size - 1
    of_a_row = 2 * channels * _product_bytes(config, device)
    of_a_row += _exclusion_bytes(loss, config.image.dimensions) + (device == "cuda")
    of_sums = 3 * FP32_BYTES  # both losses, and the weight
    agreement = _agreement_bytes(world_size, device)
    if loss.exchange == "ring":
        # Once around the ring in each pass; in the second with the rows' softmax weights.
        return agreement + others * rows * (2 * of_a_row + 2 * FP32_BYTES + of_sums)
    softmax, column = 2 * FP32_BYTES, FP32_BYTES * _num_panels(rows, on_kernels=has_kernels(config, device))
    if loss.form == "nt_xent" and rows % PANEL == 0 and rows * world_size >= 3 * PANEL:
        column *= 3  # sums over columns within both views, too
    return agreement + others * rows * (of_a_row + of_sums + softmax + column)


def _info_nce_products(config: PretrainConfig, pairs: int, world_size: int) -> float:
    if config.loss.form == "cross_view":
        return 10
    halves = config.loss.exchange == "all_gather" and pairs // PANEL >= 3 and pairs // world_size % PANEL == 0
    return 20 + 2 * PANEL / pairs if halves else 22


def _exclusion_bytes(loss: LossConfig, dimensions: int) -> int:
    """Return the bytes per row that identify pixels of the same image to exclude from the negatives."""
    if loss.exclude_within_mm is None:
        return 0
    return 8 + (FP32_BYTES * dimensions if math.isfinite(loss.exclude_within_mm) else 0)


def _within_images_loss(
    pairs: PixelPairs,
    config: LossConfig,
    temperature: float | Tensor,
    findings: Findings | None,
    parts: dict[str, Tensor] | None,
) -> Tensor:
    return info_nce_within_images(
        pairs.queries,
        pairs.keys,
        num_images=len(pairs.queries) // config.pixel_pairs_per_image,
        temperature=temperature,
        form=config.form,
        decoupled=config.decoupled,
        weights=pairs.weights,
        position_mm=pairs.position_mm,
        radius_mm=config.exclude_within_mm or 0.0,
        findings=findings,
        parts=parts,
    )


def _within_images_memory(config: PretrainConfig, rows: int, world_size: int, device: str) -> LossMemory:
    # Normalised rows, and the similarities of some images, of which softmax and its gradient need a few copies.
    tower, per_image = rows * config.model.embedding_channels, config.loss.pixel_pairs_per_image
    at_once = min(rows // per_image, images_at_once(per_image, is_gpu=device == "cuda"))
    square = FP32_BYTES * at_once * per_image**2 * (4 if config.loss.form == "nt_xent" else 2)
    return LossMemory(2 * FP32_BYTES * 2 * tower, 2 * FP32_BYTES * 3 * tower + 5 * square)


def _within_images_traffic(config: PretrainConfig, rows: int, world_size: int, device: str) -> int:
    # Sums of costs and of weights.
    return _agreement_bytes(world_size, device) + _reduced_bytes(2 * FP32_BYTES, world_size)


def _barlow_twins_loss(
    pairs: PixelPairs,
    config: LossConfig,
    temperature: float | Tensor,
    findings: Findings | None,
    parts: dict[str, Tensor] | None,
) -> Tensor:
    return barlow_twins(
        pairs.queries,
        pairs.keys,
        off_diagonal_weight=config.off_diagonal_weight,
        weights=pairs.weights,
        findings=findings,
        parts=parts,
    )


def _barlow_twins_memory(config: PretrainConfig, rows: int, world_size: int, device: str) -> LossMemory:
    # Saved: both views centred, one of them weighted. Temporaries: both as given, and gradients.
    tower = rows * config.model.embedding_channels
    return LossMemory(FP32_BYTES * 3 * tower, FP32_BYTES * 8 * tower)


def _barlow_twins_traffic(config: PretrainConfig, rows: int, world_size: int, device: str) -> int:
    channels = config.model.embedding_channels
    sums = FP32_BYTES * (2 * channels + 2 + (2 + channels) * channels)
    return _agreement_bytes(world_size, device) + _reduced_bytes(sums, world_size)


OBJECTIVES: dict[str, Objective] = {
    "info_nce": Objective(_info_nce_loss, _info_nce_memory, _info_nce_traffic, _info_nce_products),
    "info_nce_within_images": Objective(_within_images_loss, _within_images_memory, _within_images_traffic),
    "barlow_twins": Objective(_barlow_twins_loss, _barlow_twins_memory, _barlow_twins_traffic),
}
"""By `LossConfig.name`; InfoNCE with negatives of the same image is an objective of its own."""
