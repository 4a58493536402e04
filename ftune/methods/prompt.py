"""Prompt tuning: trained input embeddings in front of every row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import Field

from ftune.methods._virtual_tokens import VirtualTokens, mend_generation
from ftune.methods.adapter_files import save_peft
from ftune.methods.adapters import attach
from ftune.methods.types import Context, ModelShape

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Prompt"]


class Prompt(VirtualTokens):
    """Train the embeddings of virtual tokens in front of every row (Lester et al., arXiv:2104.08691)."""

    aliases: ClassVar[tuple[str, ...]] = ("prompt_tuning", "p_tuning", "soft_prompt")
    paper: ClassVar[str] = "arXiv:2104.08691"
    summary: ClassVar[str] = "embeddings of virtual tokens in front of every row"
    formula: ClassVar[str] = "h = model([P; E(x)]), P trained"
    typical_share: ClassVar[str] = "0.001 %"
    choose: ClassVar[str] = (
        "Many small tasks on one large frozen base: a task is 0.3 MB on 7B, and a batch can mix tasks."
    )
    avoid: ClassVar[str] = (
        "Below some billions of parameters, where it falls far behind LoRA; and for a few hundred steps."
    )
    cost: ClassVar[str] = (
        "Next to no state and the smallest files; rows longer by the virtual tokens, and slow learning."
    )
    evidence: ClassVar[str] = ".057 by default, .343 tuned, in PEFT's comparison (GSM8K, one seed; LoRA .478)."
    composes: ClassVar[str] = "Checkpointing, accumulation, batches padded on either side. Not packing; not mergeable."
    default_learning_rate: ClassVar[float] = 1e-2
    few_updates_factor: ClassVar[float] = 1.0
    not_mergeable_because: ClassVar[str] = "it trains inputs, not weights: what it learned stands in front of every row"
    not_lora_because: ClassVar[str] = "it trains inputs, not weights: there is no update of a matrix to write"
    replayable: ClassVar[bool] = True

    name: Literal["prompt"] = Field("prompt", description="Prompt tuning.")

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Put trained embeddings in front; they start as the embeddings of real tokens.

        PEFT's own random start has ten times the spread of a vocabulary's embeddings.
        """
        import torch
        from peft import PromptTuningConfig

        config = PromptTuningConfig(num_virtual_tokens=self.virtual_tokens, task_type="CAUSAL_LM")
        embedding = cast(Any, model).get_input_embeddings()
        ids = self.start_ids(embedding, context)
        wrapped = attach(model, config, context)
        with torch.no_grad():
            # Through the module: Gemma's scales what it looks up.
            cast(Any, wrapped).prompt_encoder["default"].embedding.weight.copy_(embedding(ids))
        return self._remember_start(mend_generation(wrapped))

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter: ``adapter_model.safetensors`` and ``adapter_config.json``."""
        save_peft(model, out, context)

    def trainable_parameters(self, shape: ModelShape) -> int:
        """One embedding a virtual token."""
        return self.virtual_tokens * shape.hidden
