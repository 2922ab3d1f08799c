"""Checks of a loss's arguments, and pixel pairs of weight 0."""

import math

import torch
from torch import Tensor

from p2r.loss.contrast import Exchange, Form, SameImage
from p2r.loss.ranks import Findings, postpones, refuse_pair, refuse_weights


def number_in(value: float | Tensor) -> float:
    """Return the value of a number or a one-element tensor; NaN for other tensors."""
    if not isinstance(value, Tensor):
        return float(value)
    return float(value.detach()) if value.numel() == 1 else math.nan


def refuse_form_and_temperature(form: str, temperature: float | Tensor, number: float | None) -> None:
    """Raise ValueError for an unknown form, or for a temperature other than one positive number.

    Args:
        form: Candidates of an anchor.
        temperature: The temperature as passed to the loss.
        number: Its value; None if reading it would synchronise with the device.
    """
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature must be one number, got a tensor of shape {tuple(temperature.shape)}")
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"temperature must be positive and finite, got {number}")
    if form not in ("cross_view", "nt_xent"):
        raise ValueError(f"form must be 'cross_view' or 'nt_xent', got {form!r}")


def refuse_arguments(
    queries: Tensor,
    keys: Tensor,
    temperature: float | Tensor,
    number: float | None,
    form: str,
    weights: Tensor | None,
    exclude: SameImage | None,
    exchange: str,
    findings: Findings | None,
) -> None:
    """Raise ValueError if an argument of `info_nce` breaks a rule. `number`: as in `refuse_form_and_temperature`."""
    refuse_form_and_temperature(form, temperature, number)
    if exchange not in ("all_gather", "ring"):
        raise ValueError(f"exchange must be 'all_gather' or 'ring', got {exchange!r}")
    refuse_pair(queries=queries, keys=keys)
    num, device = len(queries), queries.device
    if weights is not None:
        refuse_weights(weights, queries, findings)
    if exclude is not None:
        _refuse_exclusion(exclude, num, device, findings)


def _refuse_exclusion(exclude: SameImage, num: int, device: torch.device, findings: Findings | None) -> None:
    image, position_mm = exclude.image, exclude.position_mm
    if image.shape != (num,) or image.dtype.is_floating_point or image.device != device:
        raise ValueError(
            f"expected exclude.image ({num},) of integers on {device}, got {tuple(image.shape)} of {image.dtype} on {image.device}"
        )
    if not exclude.radius_mm > 0:
        raise ValueError(f"exclude.radius_mm must be positive, got {exclude.radius_mm}")
    if position_mm is None:
        if math.isfinite(exclude.radius_mm):
            raise ValueError("exclude.position_mm is needed for a radius")
        return
    if position_mm.ndim != 2 or len(position_mm) != num or position_mm.device != device:
        raise ValueError(
            f"expected exclude.position_mm ({num}, D) on {device}, got {tuple(position_mm.shape)} on {position_mm.device}"
        )
    bad = ~torch.isfinite(position_mm)
    if postpones(findings, position_mm):
        findings.add("{count} numbers of exclude.position_mm are not finite", bad.sum())
    elif bad.any():
        raise ValueError("exclude.position_mm must be finite")


def equal_on_all_ranks(
    queries: Tensor,
    temperature: float,
    form: Form,
    decoupled: bool,
    exclude: SameImage | None,
    exchange: Exchange,
) -> dict[str, float]:
    """Return the settings that every rank must share, as numbers by name."""
    return {
        "the number of embedding channels": float(queries.shape[1]),
        "bytes per number of the embeddings": float(queries.element_size()),
        "temperature": temperature,
        "form (1: nt_xent)": float(form == "nt_xent"),
        "decoupled": float(decoupled),
        "exchange (1: ring)": float(exchange == "ring"),
        "spatial dimensions of exclude (0: none)": 0.0
        if exclude is None
        else float(1 if exclude.position_mm is None else 1 + exclude.position_mm.shape[1]),
        "exclude.radius_mm": 0.0 if exclude is None else exclude.radius_mm,
    }


def replace_weightless(queries: Tensor, keys: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace rows of weight 0, which may hold anything, by ones; return a mask of the other rows.

    The rows cannot be dropped: only the device knows their number, and reading it would synchronise.
    """
    is_present = weights > 0
    queries, keys = (torch.where(is_present[:, None], rows, torch.ones_like(rows)) for rows in (queries, keys))
    return queries, keys, is_present.to(torch.uint8)


def drop_weightless(
    queries: Tensor, keys: Tensor, weights: Tensor, exclude: SameImage | None
) -> tuple[Tensor, Tensor, Tensor, SameImage | None]:
    """Leave out the pairs of weight 0."""
    kept = weights > 0
    if kept.all():
        return queries, keys, weights, exclude
    if exclude is not None:
        position_mm = None if exclude.position_mm is None else exclude.position_mm[kept]
        exclude = SameImage(exclude.image[kept], position_mm, exclude.radius_mm)
    return queries[kept], keys[kept], weights[kept], exclude
