"""Load what a plan names: base model, adapter, optimizer, in this order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftune.plan.base_model import load_base
from ftune.plan.missing import require_finite
from ftune.plan.plan import Plan
from ftune.plan.recompute import enable_checkpointing

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["build"]


def build(plan: Plan) -> tuple[nn.Module, Optimizer]:
    """Load the base model, let the method adapt it, and make its optimizer.

    Raises:
        ModelError: The weights cannot be read or do not fit the method.
    """
    import torch

    recipe, context = plan.recipe, plan.context
    device = torch.device("cpu") if plan.through_host else context.device
    base = load_base(recipe.model, recipe.method, context.dtype, device)
    require_finite(base, recipe.model.id)
    model = recipe.method.adapt(base, context)
    if context.recomputed_blocks:
        enable_checkpointing(model, context.recomputed_blocks)
    return model, recipe.method.optimizer(model, recipe.optimizer)
