"""A loaded model made ready to be trained or measured: one way for both, so that both find the same loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftune.errors import ModelError
from ftune.ops.kernels import has_fused, refuse_fused
from ftune.plan.documents import apart, packing_error
from ftune.plan.lean import PER_DOCUMENT, make_lean
from ftune.plan.plan import Plan
from ftune.run.fused_loss import CHUNKED, LIGER, liger_is_there
from ftune.run.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

__all__ = ["agreed", "loss_of", "make_objective"]


def agreed(accelerator: Accelerator, verdict: bool) -> bool:
    """Whether every process says so; all of them must ask."""
    import torch

    return bool(accelerator.gather(torch.tensor([int(verdict)], device=accelerator.device)).min())


def loss_of(record: dict[str, Any]) -> str:
    """How a run computes its loss, by its ``run.json``; our own where that says nothing."""
    return str(record.get("lean", {}).get("loss", CHUNKED))


def make_objective(
    model: nn.Module, plan: Plan, accelerator: Accelerator, loss: str | None = None
) -> tuple[Objective, dict[str, Any]]:
    """Replace layers and attention by ones that keep less, hold that documents stay apart, and choose the batches.

    In 16 bits the order of sums shows in the third digit of a loss over few tokens. A run and ``ftune eval`` must
    not differ by that, so both come through here.

    Args:
        model: The base, adapted or not; changed in place.
        plan: The plan it was loaded by.
        accelerator: Whose processes must agree.
        loss: How the run began to compute its loss; None: try what is best (``ftune.run.fused_loss``).

    Returns:
        The objective, and what was replaced (``ftune.plan.lean.make_lean``), with ``loss`` for the next time and
        ``kernels``: what computes norms, gates and the loss's softmax.

    Raises:
        ModelError: The rows are packed, and this architecture does not keep packed documents apart.
    """
    recipe, context = plan.recipe, plan.context
    if not agreed(accelerator, has_fused()) and has_fused():
        refuse_fused("another process cannot use them")
    found = make_lean(model, recipe.method, context, recipe.model.attention)
    isolates = _probe_packing(plan, model)
    # Every process's verdict, since all must take the same rows.
    flat = agreed(accelerator, plan.may_lie_flat and isolates and found["attention"] == PER_DOCUMENT)
    objective = Objective(model, context.dtype, flat)
    objective.fused = _takes_fused(objective, plan, accelerator, loss)
    found |= {"loss": LIGER if objective.fused else CHUNKED, "kernels": "fused" if has_fused() else "eager"}
    return objective, found


def _probe_packing(plan: Plan, model: nn.Module) -> bool:
    """Whether this architecture keeps documents in one row apart.

    Recurrent layers, and positions that a model counts for itself, ignore where a document begins.

    Raises:
        ModelError: The rows are packed, and a document's logits depend on the one before it, or differ from those
            it has alone.
    """
    if not plan.recipe.method.packable:
        return False
    leak, shift, rounding = packing_error(model, plan.context.dtype, plan.context.device, plan.shape.vocab)
    isolates = apart(leak, shift, rounding)
    if not isolates and any(len(row) > 1 for row in plan.rows):
        raise ModelError(
            f"{plan.shape.model_type} does not keep packed documents apart: the document before changes the logits "
            f"by {leak:.2g} of their spread, the place in the row by {shift:.2g} (rounding: {rounding:.2g})",
            help="set data.packing: false",
        )
    return isolates


def _takes_fused(objective: Objective, plan: Plan, accelerator: Accelerator, loss: str | None) -> bool:
    """Whether Liger's kernel computes the loss: as the run began, where it is there, or as a trial says.

    The verdict is every process's: rounding must not depend on who has a row.
    """
    device = plan.context.device
    if loss == CHUNKED or device.type != "cuda":
        return False
    positions = plan.memory.request.target_tokens
    fused = liger_is_there() and (loss == LIGER or objective.fused_pays(positions, device))
    return agreed(accelerator, fused)
