"""Whether training made the model better at what it was shown, judged by losses.

A method's vitals say that it changed the model, not that the change is any good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["effect_of", "trend"]

HARDLY = 0.01
"""Share of the loss before training; a smaller fall is taken for none."""
TENTH = 10
FEW = 100
"""Updates below which more of them may be all that is missing."""


def trend(losses: Sequence[float]) -> tuple[float, float] | None:
    """Mean training loss of the first tenth of the updates and of the last; None for fewer than two updates."""
    if len(losses) < 2:
        return None
    count = max(1, len(losses) // TENTH)
    return sum(losses[:count]) / count, sum(losses[-count:]) / count


def effect_of(
    training: dict[str, Any],
    losses: Sequence[float],
    held_out: Sequence[tuple[int, float]],
    base_loss: float | None = None,
) -> dict[str, Any]:
    """Compare losses after training with those before it.

    Args:
        training: The plan's ``training``: steps, epochs, learning rate, and the one that is usual for so many.
        losses: Training loss of each update.
        held_out: Updates made, and the held-out loss then; in order.
        base_loss: Held-out loss before the first update.

    Returns:
        ``verdict``: better, hardly_moved, worse, or unknown; ``before`` and ``after``, the losses it compares, and
        ``of``: held-out or training; ``advice``: what to change, a sentence each.
    """
    after = next((loss for step, loss in reversed(held_out) if step), None)
    trained = trend(losses)
    if base_loss is not None and after is not None:
        before, of = base_loss, "held-out"
    elif trained is not None:
        before, after, of = *trained, "training"
    else:
        return {"verdict": "unknown", "of": None, "before": None, "after": None, "advice": []}
    found: dict[str, Any] = {"of": of, "before": before, "after": after}
    if not after < before:  # nan is worse, too
        advice = _when_worse(training, trained, held_out, base_loss)
        return {"verdict": "worse", **found, "advice": advice}
    if before - after < HARDLY * before:
        return {"verdict": "hardly_moved", **found, "advice": _when_hardly_moved(training)}
    return {"verdict": "better", **found, "advice": []}


def _when_worse(
    training: dict[str, Any],
    trained: tuple[float, float] | None,
    held_out: Sequence[tuple[int, float]],
    base_loss: float | None,
) -> list[str]:
    rate, epochs = training["learning_rate"], training["epochs"]
    if trained is None or not trained[1] < trained[0]:
        lower = min(rate / 5, training.get("usual_learning_rate", rate))
        return [
            f"the training loss rose too: the learning rate is too high, try `optimizer.learning_rate: {lower:.2g}`"
        ]
    advice = ["the training loss fell: the training rows were learned by heart, or are unlike the held-out ones"]
    better = [(loss, step) for step, loss in held_out if step and base_loss is not None and loss < base_loss]
    if better:
        loss, step = min(better)
        advice.append(f"after step {step} it was {loss:.4f}: stop there, `training.max_steps: {step}`")
    elif epochs > 1:
        advice.append(f"try `training.epochs: {max(1, epochs // 3):g}`; `evaluation.every_steps` shows when it turns")
    advice.append(f"try a lower rate, `optimizer.learning_rate: {rate / 3:.2g}`")
    return advice


def _when_hardly_moved(training: dict[str, Any]) -> list[str]:
    rate, steps = training["learning_rate"], training["steps"]
    higher = max(rate * 5, training.get("usual_learning_rate", rate))
    advice = [f"try a higher rate, `optimizer.learning_rate: {higher:.2g}`"]
    if steps < FEW:
        epochs = math.ceil(training["epochs"] * max(2, FEW / steps))
        advice.append(f"or more updates than {steps}: `training.epochs: {epochs}`")
    return advice
