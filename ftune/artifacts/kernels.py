"""The kernels that a run computes its norms and gates with, and whether CUDA graphs launch those of its blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ftune.artifacts.objective import agreed
from ftune.ops.kernels import Kernels
from ftune.plan.recompute import blocks_of, is_random
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


def replay_of(plan: Plan, model: nn.Module) -> tuple[Replay | None, str]:
    """What replays the model's blocks as ``training.cuda_graphs`` asks; or None, and why they cannot be."""
    asked, method, device = plan.recipe.training.cuda_graphs, plan.recipe.method, plan.context.device
    blocks = blocks_of(model)
    recomputed = [block for block in blocks if block.gradient_checkpointing]
    why_not = {
        "training.cuda_graphs is false": asked is False,
        "there is no CUDA device": device.type != "cuda",
        "several processes exchange gradients by hooks, which a graph has not": plan.world_size > 1,
        f"{method.name} does other work in every pass, or has gradients as large as the model": not method.replayable,
        "transformers does not tell this model's blocks apart": not blocks,
        "recomputed blocks with dropout ask for the state of the random numbers": recomputed and is_random(model),
    }
    for why, holds in why_not.items():
        if holds:
            return None, why
    for block in recomputed:
        # Nothing is drawn, and the state of the random numbers cannot be asked for while a graph is recorded.
        block._gradient_checkpointing_func = partial(block._gradient_checkpointing_func, preserve_rng_state=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Replay(blocks, trained, CudaRecorder(device), plan.context.dtype, always=asked is True), ""


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
