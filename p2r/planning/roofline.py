"""Time of the pixel-pair loss on a GPU, from its operation count and the GPU's matrix throughput.

    cross_view  10 n N E operations of a rank: 2 for both sums, and 4 for each gradient, which computes similarities again
    nt_xent     20 n N E, and 2 n N E / P: sums across views, half of the sums within both views, four gradients. Of P panels of
                16,384 pairs, entries of a panel with itself are computed twice. 22 n N E if a rank has a fraction of a panel

The bfloat16 throughput is the one reached by plain products on an H100; TF32 has half of it. The fraction that the loss
reaches is modelled from the kernels' machine code (jobs/RESULTS.md), and has not been measured.

Letters: n pixel pairs of a rank, N of all, E embedding channels.
"""

from dataclasses import dataclass

from p2r.config import PretrainConfig
from p2r.engine.objectives import has_kernels, objective_of

RATES = {"bf16": 798e12, "tf32": 399e12}
"""Operations per second of an H100's matrix products, by `pretrain.precision`."""
EFFICIENCY = 0.7
"""Modelled fraction of this throughput that the loss reaches."""


@dataclass(frozen=True)
class LossTime:
    """Time of the loss of one rank and step."""

    operations: float
    least_s: float
    """Time at full throughput: no kernel can be faster."""
    expected_s: float
    """Time at the modelled fraction of it."""


def loss_time(config: PretrainConfig, *, world_size: int, device: str) -> LossTime | None:
    """Return the time of the loss; None where it is unknown: on CPUs, without kernels, and for other losses and negatives."""
    loss, products_of = config.loss, objective_of(config.loss).products
    if products_of is None or not has_kernels(config, device):
        return None
    passes = 1
    if loss.negatives == "micro_batch" and config.micro_batch is not None:
        passes = config.global_batch // (world_size * config.micro_batch)
    pairs = config.global_batch * loss.pixel_pairs_per_image // passes
    products = products_of(config, pairs, world_size)
    operations = (
        products
        * passes
        * pairs
        * (pairs / world_size)
        * config.model.embedding_channels
        * (1 + len(config.loss.levels))
    )
    least_s = operations / RATES[config.precision]
    return LossTime(operations, least_s, least_s / EFFICIENCY)


def ways_to_shorten(config: PretrainConfig, *, world_size: int, step_s: float) -> list[str]:
    """Return fields that reduce the loss to less than two thirds of a step, each with the resulting time."""
    loss = config.loss
    tries: list[dict[str, str | int]] = [{"form": "cross_view"}] if loss.form == "nt_xent" else []
    tries += [{"pixel_pairs_per_image": loss.pixel_pairs_per_image >> halvings} for halvings in range(1, 5)]
    found = {}
    for fields in tries:
        (name, value), other = *fields.items(), config.model_copy(update={"loss": loss.model_copy(update=fields)})
        time = loss_time(other, world_size=world_size, device="cuda")
        if time is not None and time.expected_s < 2 / 3 * step_s and name not in found:
            found[name] = f"pretrain.loss.{name}={value} ({time.expected_s:.2g} s)"
    return list(found.values())
