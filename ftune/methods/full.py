"""Full fine-tuning: every weight of the model is trained, in fp32, computing in the model's dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftune.methods.base import Method
from ftune.methods.targets import different
from ftune.methods.types import Context, ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["Full"]


class Full(Method):
    """Train every parameter. The weights stay fp32 (pure bf16 loses small updates); autocast computes."""

    aliases: ClassVar[tuple[str, ...]] = ("fft", "full_finetune", "full_parameter", "fullft")
    paper: ClassVar[str] = "-"
    summary: ClassVar[str] = "every weight of the model"
    formula: ClassVar[str] = "h = (W + dW) x"
    typical_share: ClassVar[str] = "100 %"
    choose: ClassVar[str] = "When memory allows it and the task is far from what the base knows, or data is plentiful."
    avoid: ClassVar[str] = "On little data (it overfits and forgets most), or when many tunes of one base are kept."
    cost: ClassVar[str] = "16 bytes for each parameter of the model (8-bit AdamW: 10), and a whole model a run."
    evidence: ClassVar[str] = (
        "Learns more than LoRA where there is much to learn, and forgets more (arXiv:2405.09673). Its best rate is "
        "about a tenth of LoRA's."
    )
    composes: ClassVar[str] = "Packing, checkpointing, 8-bit and paged AdamW. No 4-bit base: it has to change."
    not_lora_because: ClassVar[str] = "it changes every weight, norms and embeddings included"
    default_learning_rate: ClassVar[float] = 2e-5
    # By a study of 60 updates (docs/compare.md), where the best rate was 1.6e-4, and 5e-4 too high.
    few_updates_factor: ClassVar[float] = 8.0
    artifact: ClassVar[Literal["adapter", "model"]] = "model"
    saved_as: ClassVar[Literal["peft", "transformers", "ftune"]] = "transformers"

    name: Literal["full"] = Field("full", description="Full fine-tuning.")

    def base_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """fp32 always: these are the master weights."""
        import torch

        return torch.float32

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Let every parameter of the language model require grad."""
        from ftune.models.language import fixed_parameters

        fixed = fixed_parameters(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in fixed)
        return model

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """How many parameters train, and how many the optimizer kept moments of."""
        return {
            "trained_tensors": float(sum(p.requires_grad for p in model.parameters())),
            "tensors_with_state": float(len(optimizer.state)),
        }

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """Most weights were never updated. Of a few the model may have no use: those are told as training begins."""
        left = int(vitals["trained_tensors"] - vitals["tensors_with_state"])
        return (
            f"the optimizer never updated {left} of the model's tensors"
            if 2 * left >= vitals["trained_tensors"]
            else None
        )

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        if vitals["tensors_with_state"] < vitals["trained_tensors"]:
            return f"{vitals['tensors_with_state']:.0f} of {vitals['trained_tensors']:.0f} tensors were updated"
        return f"all {vitals['trained_tensors']:.0f} tensors of the model were updated"

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a whole transformers model into ``out``, in the dtype the recipe computes in."""
        from ftune.models.whole import save_whole_model

        save_whole_model(model, out, context.dtype)

    def load(self, base: nn.Module, directory: Path, context: Context) -> nn.Module:
        """Copy the saved weights over the base model's."""
        from ftune.models.whole import load_whole_model

        return load_whole_model(base, directory).requires_grad_(False)

    def merge(self, model: nn.Module, context: Context) -> nn.Module:
        """The model is already whole: return it in fp32."""
        return model.float()

    def trainable_parameters(self, shape: ModelShape) -> int:
        """Everything."""
        return shape.parameters - shape.fixed

    def products(self, shape: ModelShape) -> int:
        """For the gradients of the weights."""
        return different(shape.linears)

    def adapter_bytes(self, shape: ModelShape) -> int:
        """None: what is trained is the base model itself."""
        return 0
