"""What must hold of every update: before it is made that its numbers are finite, behind it that parameters moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ftune.errors import RunFailed
from ftune.plan.plan import Plan
from ftune.run.engines import Engine
from ftune.run.events import Event, Note
from ftune.run.micro_batches import row_numbers
from ftune.run.moved import MoveWatch
from ftune.run.steps import due

__all__ = ["Guards"]


@dataclass
class Guards:
    """Looks at every update of a run.

    Attributes:
        plan: What trains, and how long.
        model: As the engine left it, before the first of the updates.
        engine: Knows whether gradients are still there behind an update.
        first: Updates made before: of those there is a checkpoint.
        progress: Where it is kept which parameters have not moved yet (``resting``).
        save: Saves a checkpoint of so many updates.
        emit: Called with a note of parameters that learn nothing.
    """

    plan: Plan
    model: nn.Module
    engine: Engine
    first: int
    progress: dict[str, Any]
    save: Callable[[int], None]
    emit: Callable[[Event], None]
    _watch: MoveWatch = field(init=False)
    _told: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """Look at the parameters as they are.

        Raises:
            RunFailed: None of them trains.
        """
        method = self.plan.recipe.method
        self._watch = MoveWatch(
            self.model,
            keeps_gradients=self.engine.keeps_gradients and not method.updates_in_backward,
            at_rest=method.at_rest(self.model),
            of_base=method.artifact == "model",
            alone=self.plan.world_size == 1,
            only=self.progress.get("resting"),
        )

    def before_update(self, step: int, rows: list[int], norm: float, loss: float) -> None:
        """Hold that an update may be made, before it is; else save the state as it is, which is still good.

        Args:
            step: Updates made so far.
            rows: Of this one, to be told.
            norm: Of its gradients.
            loss: Its mean over target tokens.

        Raises:
            RunFailed: Loss or gradient is not finite, or the gradient's norm is over the recipe's bound.
        """
        bound = self.plan.recipe.training.stop_at_grad_norm
        over = bound is not None and norm > bound
        if math.isfinite(norm) and math.isfinite(loss) and not over:
            return
        which = "training.stop_at_grad_norm is " + f"{bound:g}" if over and math.isfinite(norm) else ""
        kept = "nothing was trained yet"
        if self.plan.recipe.method.updates_in_backward:
            # Each parameter was updated as its gradient came: there is no good state left to save.
            kept = "this update was applied in the backward pass: only earlier checkpoints are good"
        elif step:
            if step > self.first and not due(step, self.plan.recipe.checkpoint.every_steps):  # else it is there
                self.save(step)
            kept = f"step-{step} has the state before it"
        where = f"at step {step + 1}, rows {row_numbers(self.plan, rows)}"
        raise RunFailed(
            f"the gradient norm is {norm:g}, the loss {loss:g}, {where}" + (f": {which}" if which else ""),
            help=f"{kept}; look at these rows, and go on with --resume --accept-changed-data once they are mended, "
            "or train anew with a lower optimizer.learning_rate",
        )

    def after_update(self, step: int, optimizer: Optimizer) -> None:
        """Hold that what trains gets gradients and moves, while the gradients are still there.

        Args:
            step: Updates made before this one.
            optimizer: Has its learning rates.

        Raises:
            RunFailed: A trained parameter does not move.
        """
        self._watch.after_update(
            self.model,
            last=step + 1 == self.plan.total_steps,
            learning_rate=min(group["lr"] for group in optimizer.param_groups),
            at_peak=step >= self.plan.warmup_steps,
        )
        if self._watch.idle and not self._told:
            self.emit(Note(step + 1, self._watch.idle))
            self._told = True
        self.progress["resting"] = self._watch.resting
