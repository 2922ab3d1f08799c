"""Weights of a network for some contrasts -> weights of the same network for others.

Only layers that read the image depend on its contrasts: their weights have one slice of inputs for each. A network balances
its input (`p2r.contrasts.balance`), so both rules keep its features:

    one contrast -> C     each slice is the weight / C: C equal contrasts give the features of one
    C -> some of them     their slices * C / their number: the features of C contrasts of which the others are missing

Source: nnU-Net (Isensee et al. 2021) repeats the first layer for more contrasts.
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from p2r.config import ModelConfig
from p2r.contrasts import describe
from p2r.model.backbones import build_backbone
from p2r.tensors import unallocated


def config_for(config: ModelConfig, contrasts: Sequence[str] | None) -> ModelConfig:
    """Return the configuration of the same network for these contrasts; None: one contrast, of any kind."""
    names = None if contrasts is None else tuple(contrasts)
    return config.model_copy(update={"contrasts": names, "in_channels": 1 if names is None else len(names)})


def missing_contrasts(of: Sequence[str] | None, to: Sequence[str] | None) -> tuple[str, ...]:
    """Return the contrasts of `to` for which a network of the contrasts `of` has no weights.

    A network of one contrast has weights for any. A network of several has weights for these names only.
    """
    if of is None or len(of) == 1:
        return ()
    return tuple(name for name in to or () if name not in of)


def adapt_contrasts(
    weights: Mapping[str, Tensor], config: ModelConfig, *, to: Sequence[str] | None, dimensions: int
) -> dict[str, Tensor]:
    """Adapt the weights of a backbone to other contrasts.

    Args:
        weights: State of the backbone.
        config: Its configuration; `config_for` gives the one of the result.
        to: Contrasts of the result; None: one contrast, of any kind.
        dimensions: Dimensions of the image, 2 or 3.

    Raises:
        ValueError: if the backbone has several contrasts, and `to` has others, or no names.
    """
    of = config.contrasts
    if of is None or len(of) == 1:
        index, factor = [0] * len(to or [""]), 1 / len(to or [""])
    elif to is None or missing_contrasts(of, to):
        raise ValueError(f"a network of {describe(of)} has no weights for {describe(to)}")
    else:
        index, factor = [of.index(name) for name in to], len(of) / len(to)
    if index == [*range(config.in_channels)]:
        return dict(weights)
    changed = _input_weights(weights, config, dimensions=dimensions)
    return {name: weight[:, index] * factor if name in changed else weight for name, weight in weights.items()}


def _input_weights(weights: Mapping[str, Tensor], config: ModelConfig, *, dimensions: int) -> set[str]:
    """Return the names of the weights that read the image: those with another shape in a network of more contrasts."""
    # More than any layer has channels: where an image has as many as its first layer, some networks leave a layer out.
    wider = config.model_copy(update={"contrasts": None, "in_channels": config.in_channels + sum(config.channels)})
    network = unallocated(partial(build_backbone, wider, dimensions=dimensions), where="a backbone")
    return {name for name, weight in network.state_dict().items() if weight.shape != weights[name].shape}
