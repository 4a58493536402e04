"""What a low-rank adapter shows of its work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


__all__ = ["never_pulled", "update_vitals"]


def update_vitals(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """How many layers carry an update, and the least and mean norm of B, which starts at zero.

    Left out, and counted, are layers that never got a gradient but zero: the base multiplies by zero what comes of
    them.
    """
    found = {p: float(p.detach().float().norm()) for name, p in model.named_parameters() if "lora_B" in name}
    states = {p: optimizer.state.get(p) for p in found} if optimizer.state else {}
    idle = [p for p, state in states.items() if found[p] == 0 and (not state or never_pulled(state))]
    norms = [norm for p, norm in found.items() if not any(p is other for other in idle)]
    return ({"idle_layers": float(len(idle))} if idle and norms else {}) | {
        "adapted_layers": float(len(norms)),
        "lora_b_norm_mean": sum(norms) / max(1, len(norms)),
        "lora_b_norm_min": min(norms, default=0.0),
    }


def never_pulled(state: dict[str, Any]) -> bool:
    """Whether an optimizer's state of a parameter has seen no gradient but zero."""
    first = state.get("exp_avg", state.get("state1"))
    return first is not None and first.is_floating_point() and not bool(first.any())
