"""The training loop: the only one.

One update takes the rows of one global batch, in ``gradient_accumulation_steps`` micro-batches on each process.
Every micro-batch's loss is the sum over its target tokens divided by the target tokens of the whole update, over
all processes; so the gradient does not depend on how the batch is split. What is random depends on (seed, step,
micro-step, rank) and on nothing that happened before; so a resumed run equals an uninterrupted one, and no random
state is stored.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from ftune.data.batches import collate, epoch_order, length_step
from ftune.errors import Interrupted, RunFailed
from ftune.methods.documents import room_for
from ftune.ops.lr import lr_scale
from ftune.plan.plan import Plan, Rows
from ftune.run.checkpoint import Checkpoints
from ftune.run.engines import Engine
from ftune.run.events import EvalEnd, Event, Halved, Note, Saved, StepEnd, Vitals, Working
from ftune.run.memory import PeakMeter, return_free_memory, trim_between_blocks
from ftune.run.moved import MoveWatch
from ftune.run.objective import Objective
from ftune.run.out_of_memory import is_out_of_memory
from ftune.run.portions import Portions
from ftune.run.replay import Replay
from ftune.run.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from ftune.data.batches import Batch
    from ftune.data.tokenize import Example

__all__ = ["Loop", "held_out_loss"]


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

    @property
    def portions(self) -> Portions:
        """How the rows of an update are split among processes and micro-batches."""
        return Portions(self.plan, self.objective.flat, self.engine.lockstep)

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
        model, training = self.objective.model, self.plan.recipe.training
        if self.accelerator.device.type == "cpu":
            trim_between_blocks(model)
        wrapped = self.engine.wrap(self.objective, self.optimizer, method)
        self._first = start
        if evaluate_first:
            self.evaluate(start)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        watch, meter = (
            MoveWatch(
                model,
                keeps_gradients=self.engine.keeps_gradients and not method.updates_in_backward,
                at_rest=method.at_rest(model),
                of_base=method.artifact == "model",
                alone=plan.world_size == 1,
                only=self.progress.get("resting"),
            ),
            PeakMeter(self.accelerator.device),
        )
        told = False  # of adapters that learn nothing
        order_of, order = -1, [[0]]
        lengths = plan.row_lengths
        # Without padding there is nothing to gain from like lengths, and such updates are worse ones. Kept with the
        # checkpoints: a resumed run must see the rows in the order in which it began.
        by_length = self.progress.setdefault("by_length", not (recipe.packing or self.objective.flat))
        wrapped.train()
        end = plan.total_steps if self.until is None else min(self.until, plan.total_steps)
        for step in range(start, end):
            self.stop.step, self.stop.doing = step + 1, "this step, then saving"
            began = time.perf_counter()
            epoch, index = divmod(step, plan.steps_per_epoch)
            if epoch != order_of:
                order_of, order = (
                    epoch,
                    epoch_order(
                        lengths,
                        plan.global_batch,
                        training.seed,
                        epoch,
                        group_by_length=by_length,
                    ),
                )
            rows = order[index]
            tokens, targets = self._count(rows)
            scale = lr_scale(
                step, plan.total_steps, plan.warmup_steps, recipe.schedule.name, recipe.schedule.min_lr_ratio
            )
            for group in self.optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale

            total = self._gradients(step, rows, targets, wrapped)
            self.engine.exchange(trained)
            norm = self.engine.gradient_norm(method, trained, self.optimizer)
            loss_sum = float(self.accelerator.reduce(total, "sum"))
            self._require_sane(step, start, norm, loss_sum / targets, rows)
            self.engine.update(trained, self.optimizer, training.max_grad_norm, norm)
            # Must run before zero_grad: importance scores read .grad.
            extra = method.after_step(model, step + 1)
            watch.after_update(
                model,
                last=step + 1 == plan.total_steps,
                learning_rate=min(group["lr"] for group in self.optimizer.param_groups),
                at_peak=step >= plan.warmup_steps,
            )
            if watch.idle and not told:
                self.emit(Note(step + 1, watch.idle))
                told = True
            self.progress["resting"] = watch.resting
            self.optimizer.zero_grad(set_to_none=True)

            # On a GPU without the optimizer's work, which the next update waits for: the norm came before it.
            seconds = time.perf_counter() - began
            self.emit(
                StepEnd(
                    step=step + 1,
                    loss=loss_sum / targets,
                    learning_rate=self.optimizer.param_groups[0]["lr"],
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

    def _require_sane(self, step: int, start: int, norm: float, loss: float, rows: list[int]) -> None:
        """Hold that an update may be made, before it is; else save the state as it is, which is still good.

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
            if step > start and not _due(step, self.plan.recipe.checkpoint.every_steps):  # else it is there
                self.save(step)
            kept = f"step-{step} has the state before it"
        raise RunFailed(
            f"the gradient norm is {norm:g}, the loss {loss:g}, at step {step + 1}, rows {self._row_numbers(rows)}"
            + (f": {which}" if which else ""),
            help=f"{kept}; look at these rows, and go on with --resume --accept-changed-data once they are mended, "
            "or train anew with a lower optimizer.learning_rate",
        )

    def _after(self, step: int) -> None:
        """Evaluate and save when due, and stop when asked."""
        recipe, final, pausing = self.plan.recipe, step == self.plan.total_steps, step == self.until
        stopping = self._stop_signal()
        if final:
            self.stop.doing = "what is left: the last evaluation, and saving the result"
        # Saved first: what goes wrong in an evaluation must not cost the run.
        saved = bool(final or pausing or stopping or _due(step, recipe.checkpoint.every_steps))
        if saved:
            self.save(step)
        due = pausing or _due(step, recipe.evaluation.every_steps)
        if self.plan.eval_rows and (final or (not stopping and due)):
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
        assert self.plan.splits.eval is not None
        began = time.perf_counter()
        self.emit(Working(step, "held-out loss"))
        method, model = self.plan.recipe.method, self.objective.model
        as_base = None if step or method.starts_as_base else method.switched_off(model)
        with as_base or nullcontext():
            loss, count = self._held_out_loss()
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

    def _gradients(self, step: int, rows: list[int], targets: int, wrapped: nn.Module) -> Tensor:
        """Make the gradients of an update; returns the sum of its losses on this process.

        Where memory runs out and ``auto_batch`` allows it, every process makes the update anew, and those to come, in
        smaller micro-batches.
        """
        rank = self.accelerator.process_index
        while True:
            halvings = self.progress.get("halvings", 0)
            mine, total, failure = self.portions.of(rows, rank, halvings), None, None
            try:
                total = self._backward(step, mine, targets, wrapped)
            except Exception as error:
                if not (is_out_of_memory(error) and (self.auto_batch or self._has_graphs)):
                    raise
                failure = error.with_traceback(None)  # which holds the activations
            if failure is not None:
                freed = self._let_graphs_go()
                self._drop_gradients()  # before asking the others, which takes memory too
                if freed:
                    continue
            short = self._ranks_where(failure is not None) if self.auto_batch else []
            if total is not None and not short:
                return total
            if any(self.portions.smallest(rows, each, halvings) for each in short):
                raise failure or MemoryError(f"process {short[0]} ran out of memory")
            if failure is None:
                self._drop_gradients()
            self.progress["halvings"] = self.portions.halved(rows, short, halvings)
            before, now = (len(self.portions.of(rows, short[0], n)) for n in (halvings, self.progress["halvings"]))
            self.emit(Halved(step, self.progress["halvings"], before, now))

    @property
    def _has_graphs(self) -> bool:
        return self.replay is not None and self.replay.has_graphs

    def _let_graphs_go(self) -> bool:
        """Free the memory of graphs; whether there were any."""
        if self.replay is None or not self.replay.has_graphs:
            return False
        self.replay.release("memory ran out beside them")
        return True

    def _held_out_loss(self) -> tuple[float, int]:
        """The held-out loss; where graphs of training are in the way of it, without them."""
        try:
            return held_out_loss(self.objective, self.plan, self.accelerator)
        except Exception as error:
            if not (is_out_of_memory(error) and self._has_graphs):
                raise
        self._let_graphs_go()
        return held_out_loss(self.objective, self.plan, self.accelerator)

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        return_free_memory()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ranks_where(self, here: bool) -> list[int]:
        """The processes that say so; all of them must ask."""
        if self.plan.world_size == 1:
            return [0] if here else []
        flags = self.accelerator.gather(torch.tensor([int(here)], device=self.accelerator.device))
        return [int(rank) for rank in flags.nonzero().flatten()]

    def _backward(self, step: int, mine: list[list[int]], targets: int, wrapped: nn.Module) -> Tensor:
        method, model = self.plan.recipe.method, self.objective.model
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step, micro in enumerate(mine):
            last = micro_step == len(mine) - 1
            if step == self._first:
                self.emit(Working(step, "update", micro_step, len(mine)))
            batch = self._batch(micro)

            def compute(micro_step: int = micro_step, last: bool = last, batch: Batch = batch) -> Tensor:
                self._reseed(step, micro_step)
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
                total += compute() if self.replay is None else self.replay.run(step, _shape(batch), compute)
        return total

    def _count(self, rows: list[int]) -> tuple[int, int]:
        """Real tokens and target tokens of an update; every process knows all rows, so none has to ask."""
        examples = [self.plan.splits.train.examples[i] for row in rows for i in self.plan.rows[row]]
        return sum(len(e.input_ids) for e in examples), sum(e.target_tokens for e in examples)

    def _batch(self, micro: list[int]) -> Batch:
        examples = self.plan.splits.train.examples
        documents = [[examples[i] for i in self.plan.rows[row]] for row in micro]
        return make_batch(documents, self.plan, self.objective.flat).to(self.accelerator.device)

    def _row_numbers(self, rows: list[int]) -> list[int]:
        examples = self.plan.splits.train.examples
        return sorted({examples[i].row for row in rows for i in self.plan.rows[row]})[:20]

    def _reseed(self, step: int, micro_step: int) -> None:
        """Make dropout a function of (seed, step, micro-step, rank)."""
        where = f"{self.plan.recipe.training.seed}/{step}/{micro_step}/{self.accelerator.process_index}"
        torch.manual_seed(int.from_bytes(hashlib.blake2b(where.encode(), digest_size=7).digest()))

    def _stop_signal(self) -> int:
        """The signal that asked to stop, agreed on by all processes, or 0."""
        if self.plan.world_size == 1:
            return self.stop.signal_number
        flag = torch.tensor([self.stop.signal_number], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())


def _shape(batch: Batch) -> tuple[int, ...]:
    """What decides the shapes of a model's tensors: rows, their length, and room for so many documents in them."""
    # Padding is a document of its own.
    documents = len(batch.rows) + (batch.tokens < batch.input_ids.numel())
    return *batch.input_ids.shape, 0 if batch.position_ids is None else room_for(documents)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


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


def make_batch(rows: list[list[Example]], plan: Plan, flat: bool = False) -> Batch:
    """Collate rows of documents; flat, or for flash attention, all documents become one row, without padding.

    transformers finds the borders of documents for flash attention only in a batch of one row; in more rows it
    would attend across them.
    """
    if flat or (plan.recipe.packing and plan.recipe.model.attention.startswith("flash")):
        rows = [[document for row in rows for document in row]]
    longest = max((sum(map(len, row)) for row in rows), default=1)
    # Any token serves. That for padding may have an embedding of zeros, of which some architectures (gemma3n) take a
    # root, whose gradient is none.
    padding = next((int(example.input_ids[0]) for row in rows for example in row), plan.tokenizer.pad_token_id)
    return collate(rows, padding, multiple_of=length_step(longest))
