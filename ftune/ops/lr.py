"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

__all__ = ["lr_scale"]


def lr_scale(step: int, total_steps: int, warmup_steps: int, shape: str, min_ratio: float = 0.0) -> float:
    """The share of the peak learning rate at which update ``step`` is made.

    Warm-up is linear and starts above zero, so that the first update moves something; a decay reaches
    ``min_ratio`` one step after the last, so that the last update moves something too.

    Args:
        step: Number of updates made before this one, from 0.
        total_steps: Updates in the whole run.
        warmup_steps: Updates before the peak is reached.
        shape: ``cosine`` (SGDR, arXiv:1608.03983, without restarts), ``linear`` or ``constant``.
        min_ratio: Where the decay ends.

    Raises:
        ValueError: The shape is not one of these.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if shape == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if shape == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    elif shape == "linear":
        falling = 1 - progress
    else:
        raise ValueError(f"unknown schedule {shape!r}")
    return min_ratio + (1 - min_ratio) * falling
