"""The recipe's ``optimizer`` block, and the optimizers it can name.

Every optimizer here is AdamW (Loshchilov & Hutter, arXiv:1711.05101); what differs is where its two moments
live: fp32 on the device, quantized to 8 bits in blocks (Dettmers et al., arXiv:2110.02861), or paged to the
host when the device runs out (QLoRA, arXiv:2305.14314, sec. 3).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ftune.errors import ModelError

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["OptimizerSpec", "build_optimizer", "state_bytes_per_element"]

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]


class OptimizerSpec(BaseModel):
    """AdamW's settings. ``learning_rate: null`` takes the method's own default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: OptimizerName = Field("adamw", description="adamw, or its 8-bit and paged forms (bitsandbytes).")
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Peak learning rate. Default: the method's own (`ftune methods`), higher for under 1000 updates.",
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="Decay of the two moments.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="Decoupled weight decay; never applied to norms, biases or magnitudes."
    )

    @property
    def needs_bitsandbytes(self) -> bool:
        """Whether the optimizer comes from bitsandbytes."""
        return self.name != "adamw"


_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def build_optimizer(groups: list[dict[str, Any]], spec: OptimizerSpec) -> Optimizer:
    """Build AdamW over parameter groups, each of which carries its ``lr``.

    The peak rate of each group is kept under ``base_lr``: the loop sets ``lr = base_lr * scale(step)``.

    Args:
        groups: ``{"params": [...], "lr": float, "weight_decay": float}`` each.
        spec: The recipe's optimizer block.

    Raises:
        ModelError: The optimizer needs bitsandbytes and it is not installed.
    """
    import torch

    for group in groups:
        group["base_lr"] = group["lr"]
    common: dict[str, Any] = {"betas": spec.betas, "eps": spec.eps}
    if spec.name == "adamw":
        # One pass over a parameter, its gradient and its moments instead of a dozen, and no copy of any.
        return torch.optim.AdamW(groups, **common, fused=True)
    try:
        optim = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ModelError(f"optimizer `{spec.name}` needs bitsandbytes", help="pip install 'ftune[qlora]'") from error
    optimizer: Optimizer = getattr(optim, _BITSANDBYTES[spec.name])(groups, **common)
    return optimizer


def state_bytes_per_element(name: str) -> float:
    """Bytes of optimizer state for each trained element: two fp32 moments, or two 8-bit ones and their scales.

    bitsandbytes keeps one fp32 scale for each block of 256 elements and moment.
    """
    return 2 * (1 + 4 / 256) if "8bit" in name else 8.0
