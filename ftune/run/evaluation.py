"""The held-out loss, on its own and as an evaluation of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ftune.plan.plan import Plan, Rows
from ftune.run.engines import Engine
from ftune.run.events import EvalEnd, Event, Vitals, Working
from ftune.run.micro_batches import make_batch
from ftune.run.objective import Objective
from ftune.run.recovery import Recovery

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftune.data.batches import Batch

__all__ = ["Evaluation", "held_out_loss"]


@dataclass(frozen=True)
class Evaluation:
    """Evaluates a model while it trains.

    Attributes:
        plan: Whose held-out split.
        engine: How the processes share the model.
        objective: The model.
        optimizer: Which a method may look at.
        recovery: Makes an evaluation anew that ran out of memory beside CUDA graphs.
        progress: Where the loss of the base is kept (``base_loss``).
        emit: Called with what was found.
    """

    plan: Plan
    engine: Engine
    objective: Objective
    optimizer: Optimizer
    recovery: Recovery
    progress: dict[str, Any]
    emit: Callable[[Event], None]

    def run(self, step: int) -> None:
        """Measure the held-out loss and emit it; before the first update, that of the base model.

        Args:
            step: Updates made so far.
        """
        began = time.perf_counter()
        self.emit(Working(step, "held-out loss"))
        method, model = self.plan.recipe.method, self.objective.model
        as_base = None if step or method.starts_as_base else method.switched_off(model)
        with as_base or nullcontext():
            loss, count = self.recovery.without_graphs(
                lambda: held_out_loss(self.objective, self.plan, self.engine.accelerator)
            )
        self.engine.after_evaluation()
        if not step:
            # Kept with every checkpoint: it cannot be measured any more.
            self.progress["base_loss"] = loss
        perplexity = math.exp(min(loss, 700.0))
        self.emit(EvalEnd(step, loss, perplexity, count, time.perf_counter() - began))
        if 0 < step < self.plan.total_steps:  # those of the end are judged, by the caller
            with self.engine.whole_adapters(model, method):
                vitals = method.vitals(model, self.optimizer)
            self.emit(Vitals(step, vitals))


@torch.no_grad()
def held_out_loss(
    objective: Objective, plan: Plan, accelerator: Accelerator, rows: Rows | None = None
) -> tuple[float, int]:
    """Mean loss for each target token of the held-out split, and the number of those tokens.

    Rows are shared out among the processes; the model is left in training mode if it was.

    Args:
        objective: The model.
        plan: Whose held-out split.
        accelerator: Whose processes.
        rows: Some of the split's rows; None: all of them.
    """
    assert plan.splits.eval is not None
    total = torch.zeros(2, dtype=torch.float64, device="cpu")
    was_training = objective.training
    objective.eval()
    try:
        rank, world = accelerator.process_index, accelerator.num_processes
        for batch in eval_batches(plan, rank, world, objective.flat, plan.eval_rows if rows is None else rows):
            loss = objective(batch.to(accelerator.device))
            total += torch.tensor([float(loss), float(batch.target_tokens)], dtype=torch.float64)
    finally:
        objective.train(was_training)
    loss_sum, count = accelerator.reduce(total.to(accelerator.device), "sum").tolist()
    return loss_sum / max(1.0, count), int(count)


def eval_batches(plan: Plan, rank: int, world: int, flat: bool, of: Rows) -> list[Batch]:
    """The held-out rows of one process as batches of rows of similar length."""
    held_out, size = plan.splits.eval, plan.recipe.evaluation.batch_size
    assert held_out is not None
    rows = sorted(
        ([held_out.examples[i] for i in row] for row in of),
        key=lambda row: sum(len(example.input_ids) for example in row),
    )[rank::world]
    # As many on every process, the last perhaps empty: where a model is sharded, each forward pass is an exchange.
    count = math.ceil(math.ceil(len(of) / world) / size)
    return [make_batch(rows[i * size : (i + 1) * size], plan, flat) for i in range(count)]
