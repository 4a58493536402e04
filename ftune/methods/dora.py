"""DoRA: LoRA that trains the magnitude of each output apart from its direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.methods._low_rank import LowRank
from ftune.methods.adapters import cast_inputs
from ftune.methods.saved_bytes import keeps_output
from ftune.methods.targets import match_targets
from ftune.methods.types import Context, ModelShape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

__all__ = ["Dora", "dora_layers", "magnitude_vitals"]


class Dora(LowRank):
    """Train direction by LoRA and a magnitude for each output (Liu et al., arXiv:2402.09353)."""

    paper: ClassVar[str] = "arXiv:2402.09353"
    summary: ClassVar[str] = "direction by LoRA, and a magnitude for each output"
    formula: ClassVar[str] = "h = m (W + (alpha/r) B A) / ||W + (alpha/r) B A|| x"
    typical_share: ClassVar[str] = "0.1-1 %"
    choose: ClassVar[str] = "Small ranks (4 to 16), where LoRA falls short of full fine-tuning."
    avoid: ClassVar[str] = "When step time or activation memory decides: it learns little more than LoRA at rank 32 up."
    cost: ClassVar[str] = "LoRA's step time and a tenth more memory; with dropout 1.3 x, and 2 to 3 x the activations."
    evidence: ClassVar[str] = (
        ".469 in PEFT's comparison (GSM8K, one seed), where LoRA of the same rank has .478: a tie. Its paper reports "
        "gains over LoRA, most at ranks of 4 and 8 (arXiv:2402.09353, sec. 5.5)."
    )
    composes: ClassVar[str] = "4-bit bases, packing, checkpointing; merges exactly. Not convertible to LoRA."
    not_lora_because: ClassVar[str] = "the trained magnitudes rescale the base weights themselves; use `ftune merge`"
    quantizable: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    name: Literal["dora"] = Field("dora", description="Weight-decomposed low-rank adaptation.")

    def lora_settings(self) -> dict[str, Any]:
        """PEFT's switch."""
        return {"use_dora": True}

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Attach A, B and magnitudes, which start as the row norms of the base weights.

        PEFT takes the norms in the base's dtype: in bf16 each is off by up to 0.4 %, and so is the model at its
        start. Here they are taken in fp32; for the same reason the input of the update stays fp32.
        """
        adapted = cast_inputs(super().adapt(model, context), enabled=True)
        for magnitude, norms in dora_layers(adapted):
            magnitude.data.copy_(norms)
        return adapted

    def decays(self, name: str, parameter: nn.Parameter) -> bool:
        """Magnitudes do not decay: zero is not their neutral value."""
        return "lora_magnitude_vector" not in name and super().decays(name, parameter)

    def vitals(self, model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
        """LoRA's vitals, and how far the magnitudes moved from the norms of the base weights."""
        return super().vitals(model, optimizer) | magnitude_vitals(model)

    def not_at_work(self, vitals: dict[str, float]) -> str | None:
        """As LoRA's, or magnitudes that stayed: then this is LoRA on normalized directions."""
        if not vitals["magnitude_change_mean"] > 1e-7:
            return "the magnitudes are still the norms of the base weights"
        return super().not_at_work(vitals)

    def vitals_line(self, vitals: dict[str, float]) -> str:
        """For people."""
        return f"magnitudes moved by {vitals['magnitude_change_mean']:.2%}, " + super().vitals_line(vitals)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """LoRA's, and one magnitude for each output of each target."""
        targets = match_targets(shape.linears, self.target_modules)
        return super().trainable_parameters(shape) + sum(linear.out_features for linear in targets)

    def saved_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """With dropout, what PEFT computes ``B A`` by: identity matrices, and in 16 bits cast copies of A and B."""
        if not self.dropout:
            return super().saved_bytes(shape, dtype_bytes)
        targets = match_targets(shape.linears, self.target_modules)
        low_rank = self.rank * sum(linear.in_features + linear.out_features for linear in targets)
        identities = sum(linear.in_features**2 for linear in targets)
        return dtype_bytes * (identities + (low_rank if dtype_bytes < 4 else 0))

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """LoRA's, and each target's output where nothing else keeps it; with dropout PEFT keeps two."""
        targets = match_targets(shape.linears, self.target_modules)
        kept = [linear for linear in targets if self.dropout or not keeps_output(shape, linear)]
        outputs = sum(linear.out_features for linear in kept) * (2 if self.dropout else 1)
        return super().saved_bytes_per_token(shape, dtype_bytes) + outputs * dtype_bytes


def dora_layers(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each DoRA magnitude, (out,), with the row norms of its base weight in fp32."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    from ftune.ops.sharded import whole

    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if magnitudes:
            layer = cast(Any, module)
            weight = whole(dequantize_module_weight(layer.get_base_layer())).detach().float()
            yield (
                magnitudes["default"].weight,
                torch.linalg.norm(weight.T if layer.fan_in_fan_out else weight, dim=1),
            )


def magnitude_vitals(model: nn.Module) -> dict[str, float]:
    """How far DoRA's magnitudes moved from the row norms of the base weights, as a mean share of them."""
    shares = [
        float(((trained.detach().float() - norms).abs() / norms.clamp_min(1e-12)).mean())
        for trained, norms in dora_layers(model)
    ]
    return {"magnitude_change_mean": sum(shares) / max(1, len(shares))}
