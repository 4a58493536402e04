"""The ``quantization`` block: 4-bit base weights under a trained adapter (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch

__all__ = ["Quantization"]

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
