"""The kernels that a run computes its norms and gates with, and whether CUDA graphs launch those of its blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ftune.artifacts.objective import agreed
from ftune.ops.kernels import Kernels
from ftune.plan.recompute import blocks_of
from ftune.plan.resolve import Plan
from ftune.run.block_graphs import CudaRecorder
from ftune.run.compiling import choose_kernels
from ftune.run.kernel_work import find_work, portions
from ftune.run.objective import Objective
from ftune.run.replay import Replay

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

__all__ = ["kernels_of_run", "replay_of"]


def replay_of(plan: Plan, model: nn.Module) -> Replay | None:
    """What replays the model's blocks as ``training.cuda_graphs`` asks; None where they cannot be.

    Several processes exchange gradients by hooks in the backward pass, which a graph has not.
    """
    asked, method, device = plan.recipe.training.cuda_graphs, plan.recipe.method, plan.context.device
    if asked is False or not method.replayable or device.type != "cuda" or plan.world_size > 1:
        return None
    blocks = blocks_of(model)
    if not blocks:
        return None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Replay(blocks, trained, CudaRecorder(device), plan.context.dtype, always=asked is True)


def kernels_of_run(
    objective: Objective,
    plan: Plan,
    accelerator: Accelerator,
    start: int,
    *,
    lean: dict[str, Any],
    progress: dict[str, Any],
) -> tuple[Kernels, list[str]]:
    """Decide as ``training.compile`` asks, or as was decided when the run began.

    Args:
        objective: Model and loss.
        plan: The plan.
        accelerator: Whose processes must agree.
        start: Updates made so far.
        lean: What was replaced; ``compile`` is added: what was decided and why, and ``kernels`` is changed by it.
        progress: What the run keeps with its checkpoints; ``compile`` is set: whether the kernels are compiled.

    Returns:
        The kernels, and lines for people.
    """
    device, dtype = plan.context.device, plan.context.dtype
    tokens, micro_batches = portions(plan, objective.flat, start)
    began = progress.get("compile")
    kernels, found = choose_kernels(
        plan.recipe.training.compile,
        lambda: find_work(objective.model, lean, tokens, dtype, device),
        micro_batches,
        device,
        partial(agreed, accelerator),
        began,
    )
    lean["compile"], progress["compile"] = found, found["compiled"]
    if found["compiled"]:
        lean["kernels"] = "compiled"
    lines = [f"compile: {found['why']}"] if plan.recipe.training.compile else []
    if began and not found["compiled"]:
        lines.append(
            "warning: this run began with compiled kernels: from here on its numbers differ by rounding from those "
            "it would have had without the interruption"
        )
    return kernels, lines
