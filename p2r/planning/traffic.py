"""Network traffic of a worker in a step, by part of the program."""

from p2r.config import PretrainConfig
from p2r.engine.build import DTYPES
from p2r.engine.objectives import objective_of
from p2r.planning.forecast import Traffic


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
    of_loss = objective_of(config.loss).traffic
    losses *= 1 + len(config.loss.levels)
    return Traffic(gradients, weights, losses * of_loss(config, rows, world_size, device))
