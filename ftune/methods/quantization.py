"""The ``quantization`` block: 4-bit base weights under a trained adapter (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

from ftune.models.quantization import is_4bit

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Quantization", "quantization_failure", "quantization_line", "quantization_vitals"]

BLOCK = 64  # elements that share one scale; bitsandbytes' default and the paper's
BLOCK_OF_SCALES = 256  # scales that share one second-level scale under double quantization


class Quantization(BaseModel):
    """How the frozen base weights are quantized to 4 bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["nf4", "fp4"] = Field("nf4", description="nf4 (normal float, the paper's) or fp4.")
    double: bool = Field(True, description="Quantize the quantization scales too (saves 0.37 bit a weight).")
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What dequantized weights are multiplied in. auto: the model's dtype."
    )

    @property
    def bits_per_weight(self) -> float:
        """Bits for each quantized weight, scales included (QLoRA, sec. 3)."""
        if self.double:
            return 4 + 8 / BLOCK + 32 / (BLOCK * BLOCK_OF_SCALES)
        return 4 + 32 / BLOCK

    def config(self, dtype: torch.dtype) -> Any:
        """The ``transformers.BitsAndBytesConfig`` for a model that computes in ``dtype``."""
        import torch
        from transformers import BitsAndBytesConfig

        compute = dtype if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.type,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=compute,
        )


def quantization_vitals(model: nn.Module) -> dict[str, float]:
    """How many layers are 4-bit, and the bytes of their packed weights; empty when none is."""
    layers = [module for module in model.modules() if is_4bit(module)]
    if not layers:
        return {}
    packed = sum(cast(Any, layer).weight.numel() * cast(Any, layer).weight.element_size() for layer in layers)
    return {"quantized_layers": float(len(layers)), "quantized_bytes": float(packed)}


def quantization_failure(quantization: Quantization | None, vitals: dict[str, float]) -> str | None:
    """Why the 4-bit base is none, or None."""
    if quantization is not None and not vitals.get("quantized_layers"):
        return "no projection of the base is 4-bit, though the recipe asks for it"
    return None


def quantization_line(vitals: dict[str, float]) -> str:
    """The 4-bit base for people, to be put behind another line; empty when nothing is quantized."""
    if not vitals.get("quantized_layers"):
        return ""
    return f"; {vitals['quantized_layers']:.0f} layers in 4 bits ({vitals['quantized_bytes'] / 2**20:,.3g} MiB)"
