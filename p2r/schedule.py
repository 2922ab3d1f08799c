"""Learning rate, and weight in a mean of weights, as pure functions of the step: nothing to save, nothing to restore."""

import math


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_fraction: float) -> float:
    """Linear warm-up to `peak`, then cosine decay that reaches zero after the last step.

    Args:
        step: The optimizer step about to be taken, from 0.
        peak: Largest rate.
        num_steps: Length of the run.
        warmup_fraction: Part of the run in which the rate rises.
    """
    warmup = round(num_steps * warmup_fraction)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def averaging(step: int, *, decay: float) -> float:
    """Return the weight that a step's weights have in their running mean.

    It is 1 - decay, and more at first: the mean of few steps is their plain mean.

    Args:
        step: The optimizer step about to be taken, from 0.
        decay: Part of the mean that stays.
    """
    return max(1 - decay, 1 / (step + 2))
