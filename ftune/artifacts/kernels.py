"""Whether CUDA graphs launch the kernels of a run's blocks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ftune.plan.plan import Plan
from ftune.plan.recompute import blocks_of, is_random
from ftune.run.block_graphs import CudaRecorder
from ftune.run.replay import Replay

if TYPE_CHECKING:
    from torch import nn

__all__ = ["replay_of"]


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
