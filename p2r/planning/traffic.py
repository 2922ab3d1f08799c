"""Network traffic of a worker in a step, by part of the program."""

import math

from p2r.config import LossConfig, PretrainConfig
from p2r.engine.build import DTYPES
from p2r.loss.info_nce import PANEL
from p2r.planning.forecast import Traffic
from p2r.planning.memory import FP32_BYTES, has_kernels, num_loss_panels


def traffic_of(config: PretrainConfig, *, world_size: int, num_weights: int, device: str) -> Traffic:
    """Return the traffic of a rank in a step."""
    if world_size == 1:
        return Traffic(0, 0, 0)
    others = world_size - 1
    images = config.global_batch // world_size
    num_passes = images // (config.micro_batch or images)
    number = DTYPES[config.precision].itemsize
    gradients = round(2 * others / world_size * number * num_weights)
    if config.zero_stage >= 2:
        gradients *= num_passes  # every micro-batch is reduced
    weights = others * number * -(-num_weights // world_size) if config.zero_stage else 0
    if config.zero_stage == 3:
        weights *= 2 * num_passes  # gathered before each forward and each backward pass
    losses = num_passes if config.loss.negatives != "global_batch" else 1
    rows = images * config.loss.pixel_pairs_per_image // losses
    return Traffic(gradients, weights, losses * _loss_traffic(config, rows, world_size=world_size, device=device))


def _loss_traffic(config: PretrainConfig, rows: int, *, world_size: int, device: str) -> int:
    loss, channels, others = config.loss, config.model.embedding_channels, world_size - 1
    # On a CPU, ranks first exchange 18 numbers about the next operation.
    agreement = 0 if device == "cuda" else others * 18 * 8
    if loss.name == "barlow_twins":
        sums = FP32_BYTES * (2 * channels + 2 + (2 + channels) * channels)
        return agreement + round(2 * others / world_size * sums)
    if loss.negatives == "image":
        return agreement + round(2 * others / world_size * 2 * FP32_BYTES)  # sums of costs and of weights
    product = DTYPES[config.precision].itemsize if device == "cuda" else FP32_BYTES
    of_a_row = 2 * channels * product + _exclusion_bytes(loss, config.image.dimensions) + (device == "cuda")
    of_sums = 3 * FP32_BYTES  # both losses, and the weight
    if loss.exchange == "ring":
        # Once around the ring in each pass; in the second with the rows' softmax weights.
        return agreement + others * rows * (2 * of_a_row + 2 * FP32_BYTES + of_sums)
    softmax, column = 2 * FP32_BYTES, FP32_BYTES * num_loss_panels(rows, on_kernels=has_kernels(config, device))
    if loss.form == "nt_xent" and rows % PANEL == 0 and rows * world_size >= 3 * PANEL:
        column *= 3  # sums over columns within both views, too
    return agreement + others * rows * (of_a_row + of_sums + softmax + column)


def _exclusion_bytes(loss: LossConfig, dimensions: int) -> int:
    """Return the bytes per row that identify pixels of the same image to exclude from the negatives."""
    if loss.exclude_within_mm is None:
        return 0
    return 8 + (FP32_BYTES * dimensions if math.isfinite(loss.exclude_within_mm) else 0)
