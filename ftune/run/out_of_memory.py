"""Say what would fit when memory ran out, from the plan."""

from __future__ import annotations

from ftune.errors import RunFailed
from ftune.human import bytes_text
from ftune.memory.advice import savings
from ftune.plan.plan import Plan

__all__ = ["is_out_of_memory", "out_of_memory"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python could not allocate: torch's allocator on the CPU raises a plain ``RuntimeError``."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def out_of_memory(plan: Plan, step: int | None) -> RunFailed:
    """The error to raise in place of the allocator's.

    Args:
        plan: What was predicted, and what to change.
        step: Updates made so far; None while the model is loaded.
    """
    where = "before the first update" if step is None else f"after {step} of {plan.total_steps} updates"
    changes = [f"{change.text} (saves {bytes_text(saved)})" for change, saved in savings(plan.memory, plan.recipe)]
    if plan.eval_rows and plan.recipe.evaluation.batch_size > 1:
        changes.append("evaluation.batch_size: 1, if it was while evaluating")
    if plan.engine.name == "ddp" and not plan.recipe.method.updates_in_backward:
        changes.append("--auto-batch, if it was off: smaller micro-batches where memory runs out, the same result")
    return RunFailed(
        f"memory ran out {where}: the plan needs {bytes_text(plan.memory.total)}, and "
        f"{bytes_text(plan.machine.available)} were available at the start",
        help="change one of these and train anew, or continue with --resume where more is free:\n    "
        + "\n    ".join(changes or ["take a smaller model or a larger device"]),
    )
