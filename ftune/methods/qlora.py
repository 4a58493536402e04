"""QLoRA: LoRA over a base model in 4 bits. A name for ``lora`` with a ``quantization`` block."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ftune.methods._low_rank import LowRank
from ftune.methods.quantization import Quantization

__all__ = ["QLora"]


class QLora(LowRank):
    """Train LoRA over NF4 weights (Dettmers et al., arXiv:2305.14314)."""

    paper: ClassVar[str] = "arXiv:2305.14314"
    summary: ClassVar[str] = "LoRA over base weights kept in 4 bits"
    formula: ClassVar[str] = "h = dequant(NF4(W)) x + (alpha/r) B A x"
    typical_share: ClassVar[str] = "0.1-1 %"
    choose: ClassVar[str] = "When the base does not fit in 16 bits, or barely: the weights shrink to a quarter."
    avoid: ClassVar[str] = "When the base fits: dequantizing costs time, and the model is tuned around its rounding."
    cost: ClassVar[str] = "A quarter of the base's memory; 1.05 to 1.15 x LoRA's step time; files as LoRA's."
    evidence: ClassVar[str] = (
        "As 16-bit LoRA in its paper's tests (arXiv:2305.14314, sec. 4), where the base would not fit otherwise."
    )
    composes: ClassVar[str] = "Packing, checkpointing, 8-bit and paged AdamW; merges onto the dequantized base."
    as_lora: ClassVar[Literal["already", "exact", "approximate"] | None] = "already"
    quantizable: ClassVar[bool] = True
    replayable: ClassVar[bool] = True

    name: Literal["qlora"] = Field("qlora", description="LoRA over a 4-bit base.")
    quantization: Quantization = Field(Quantization(), description="How the base weights are quantized.")
