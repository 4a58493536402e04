"""The training loop: the only one.

One update takes the rows of one global batch, in ``gradient_accumulation_steps`` micro-batches on each process.
Every micro-batch's loss is the sum over its target tokens divided by the target tokens of the whole update, over
all processes; so the gradient does not depend on how the batch is split. What is random depends on (seed, step,
micro-step, rank) and on nothing that happened before (``ftune.run.steps``); so a resumed run equals an uninterrupted
one, and no random state is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ftune.errors import Interrupted
from ftune.plan.plan import Plan
from ftune.run.checkpoint import Checkpoints
from ftune.run.engines import Engine
from ftune.run.evaluation import Evaluation
from ftune.run.events import Event, Saved, StepEnd, Working
from ftune.run.guards import Guards
from ftune.run.memory import PeakMeter, trim_between_blocks
from ftune.run.micro_batches import count_tokens, micro_batch, shape_of
from ftune.run.objective import Objective
from ftune.run.portions import Portions
from ftune.run.recovery import Recovery
from ftune.run.replay import Replay
from ftune.run.signals import StopRequest
from ftune.run.steps import RowOrder, due, reseed, set_learning_rates

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from ftune.data.batches import Batch

__all__ = ["Loop"]


@dataclass
class Loop:
    """One run of the loop.

    Attributes:
        plan: What to train on, how long, in what portions.
        accelerator: Knows the device and the other processes.
        engine: How the processes share an update.
        objective: Model and loss; wrapped for the exchange of gradients when the loop starts.
        optimizer: From the method.
        checkpoints: Where to save.
        emit: Called with every event, on the main process only.
        stop: Whether a signal asked to stop.
        progress: Facts kept with every checkpoint: which parameters have not moved yet (``resting``), how often
            micro-batches were halved (``halvings``), the held-out loss before the first update (``base_loss``).
        auto_batch: Whether to halve micro-batches where memory runs out.
        replay: Computes micro-batches by CUDA graphs where that pays; None: all as usual.
        until: Pause after this update, evaluated and saved; None: make all of them.
    """

    plan: Plan
    accelerator: Accelerator
    engine: Engine
    objective: Objective
    optimizer: Optimizer
    checkpoints: Checkpoints
    emit: Callable[[Event], None]
    stop: StopRequest
    progress: dict[str, Any]
    auto_batch: bool = False
    replay: Replay | None = None
    until: int | None = None
    _first: int = field(default=0, init=False)

    def run(self, start: int = 0, *, evaluate_first: bool = False) -> bool:
        """Make updates ``start`` to the last, or to ``until``, evaluating and saving when due.

        Args:
            start: Updates made so far.
            evaluate_first: Measure the held-out loss before any further update.

        Returns:
            Whether all updates of the run are made.

        Raises:
            RunFailed: A loss or gradient is not finite, or a trained parameter does not move.
            Interrupted: A signal came; a checkpoint was saved.
        """
        plan, recipe, method = self.plan, self.plan.recipe, self.plan.recipe.method
        engine, model, optimizer = self.engine, self.objective.model, self.optimizer
        if self.accelerator.device.type == "cpu":
            trim_between_blocks(model)
        wrapped = engine.wrap(self.objective, optimizer, method)
        self._first = start
        if evaluate_first:
            self.evaluate(start)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        guards = Guards(plan, model, engine, start, self.progress, self.save, self.emit)
        meter = PeakMeter(self.accelerator.device)
        # Without padding there is nothing to gain from like lengths, and such updates are worse ones. Kept with the
        # checkpoints: a resumed run must see the rows in the order in which it began.
        by_length = self.progress.setdefault("by_length", not (recipe.packing or self.objective.flat))
        order = RowOrder(plan, by_length)
        wrapped.train()
        end = plan.total_steps if self.until is None else min(self.until, plan.total_steps)
        for step in range(start, end):
            self.stop.step, self.stop.doing = step + 1, "this step, then saving"
            began = time.perf_counter()
            rows = order.of(step)
            tokens, targets = count_tokens(plan, rows)
            set_learning_rates(optimizer, step, plan)

            total = self._recovery.gradients(step, rows, partial(self._backward, step, targets, wrapped))
            engine.exchange(trained)
            norm = engine.gradient_norm(method, trained, optimizer)
            loss = float(self.accelerator.reduce(total, "sum")) / targets
            guards.before_update(step, rows, norm, loss)
            engine.update(trained, optimizer, recipe.training.max_grad_norm, norm)
            # Must run before zero_grad: importance scores read .grad.
            extra = method.after_step(model, step + 1)
            guards.after_update(step, optimizer)
            optimizer.zero_grad(set_to_none=True)

            # On a GPU without the optimizer's work, which the next update waits for: the norm came before it.
            seconds = time.perf_counter() - began
            self.emit(
                StepEnd(
                    step=step + 1,
                    loss=loss,
                    learning_rate=optimizer.param_groups[0]["lr"],
                    grad_norm=norm,
                    tokens=tokens,
                    target_tokens=targets,
                    tokens_per_second=tokens / seconds,
                    peak_bytes=meter.peak_bytes(),
                    seconds=seconds,
                    epoch=(step + 1) / plan.steps_per_epoch,
                    extra=extra,
                )
            )
            self._after(step + 1)
        return end == plan.total_steps

    def _backward(self, step: int, targets: int, wrapped: nn.Module, mine: list[list[int]]) -> Tensor:
        """Add up the gradients of this process's micro-batches of an update; returns the sum of their losses."""
        method, model, rank = self.plan.recipe.method, self.objective.model, self.accelerator.process_index
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step, rows in enumerate(mine):
            last = micro_step == len(mine) - 1
            if step == self._first:
                self.emit(Working(step, "update", micro_step, len(mine)))
            batch = micro_batch(self.plan, rows, self.objective.flat).to(self.accelerator.device)

            def compute(micro_step: int = micro_step, last: bool = last, batch: Batch = batch) -> Tensor:
                reseed(self.plan.recipe.training.seed, step, micro_step, rank)
                summed: Tensor = wrapped(batch)
                # Gradients are averaged over processes: the factor makes the average a sum.
                loss = summed * (self.plan.world_size / targets)
                penalty = method.penalty(model) if last else None
                loss = loss if penalty is None else loss + penalty
                # Not accelerator.backward: that divides by a number from the environment.
                loss.backward()  # type: ignore[no-untyped-call]
                return summed.detach()

            # The gradients travel once an update, with the last micro-batch.
            with nullcontext() if last else self.engine.accumulating(wrapped):
                total += compute() if self.replay is None else self.replay.run(step, shape_of(batch), compute)
        return total

    def _after(self, step: int) -> None:
        """Evaluate and save when due, and stop when asked."""
        recipe, final, pausing = self.plan.recipe, step == self.plan.total_steps, step == self.until
        stopping = self._stop_signal()
        if final:
            self.stop.doing = "what is left: the last evaluation, and saving the result"
        # Saved first: what goes wrong in an evaluation must not cost the run.
        saved = bool(final or pausing or stopping or due(step, recipe.checkpoint.every_steps))
        if saved:
            self.save(step)
        evaluating = pausing or due(step, recipe.evaluation.every_steps)
        if self.plan.eval_rows and (final or (not stopping and evaluating)):
            if not final:
                self.stop.doing = "this evaluation, then saving"
            self.evaluate(step)
            stopping = self._stop_signal()
            if stopping and not saved:
                self.save(step)
        if stopping and not final:
            raise Interrupted(f"stopped after step {step} of {self.plan.total_steps}", signal_number=stopping)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss and emit it; before the first update, that of the base model."""
        evaluation = Evaluation(
            self.plan, self.engine, self.objective, self.optimizer, self._recovery, self.progress, self.emit
        )
        evaluation.run(step)

    def save(self, step: int) -> None:
        """Save a checkpoint on the main process; the others hand in their parts, and wait."""
        gathered = self.engine.gather(self.objective.model, self.optimizer)
        if self.accelerator.is_main_process:
            began = time.perf_counter()
            path = self.checkpoints.save(
                step, self.objective.model, self.plan.recipe.method, self.optimizer, self.progress, gathered
            )
            self.emit(Saved(step, path.name, time.perf_counter() - began))
        self.accelerator.wait_for_everyone()

    @property
    def _recovery(self) -> Recovery:
        portions = Portions(self.plan, self.objective.flat, self.engine.lockstep)
        return Recovery(
            self.accelerator, self.optimizer, portions, self.progress, self.emit, self.auto_batch, self.replay
        )

    def _stop_signal(self) -> int:
        """The signal that asked to stop, agreed on by all processes, or 0."""
        if self.plan.world_size == 1:
            return self.stop.signal_number
        flag = torch.tensor([self.stop.signal_number], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())
