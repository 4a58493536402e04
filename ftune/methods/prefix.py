"""Prefix tuning: trained keys and values in front of every row, in every block."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

from pydantic import Field

from ftune.errors import ModelError
from ftune.methods._virtual_tokens import VirtualTokens
from ftune.methods.adapter_files import save_peft
from ftune.methods.adapters import attach
from ftune.methods.types import Context, ModelShape, Problem, RecipeView

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Prefix"]

DEFAULT_ENCODER = 512

# Projections that make keys and values, and those that make queries as well.
_SEPARATE = ("k_proj", "v_proj")
_FUSED = ("qkv_proj", "query_key_value", "c_attn")


class Prefix(VirtualTokens):
    """Train keys and values of virtual tokens in every block (Li and Liang, arXiv:2101.00190)."""

    aliases: ClassVar[tuple[str, ...]] = ("prefix_tuning",)
    paper: ClassVar[str] = "arXiv:2101.00190"
    summary: ClassVar[str] = "keys and values of virtual tokens in every block"
    formula: ClassVar[str] = "h = attention(q, [P_k; k], [P_v; v]), P_k and P_v trained"
    typical_share: ClassVar[str] = "0.1 %"
    choose: ClassVar[str] = (
        "Many tasks on one frozen base: stronger than prompt tuning, and a batch can still mix tasks."
    )
    avoid: ClassVar[str] = (
        "When memory needs gradient checkpointing, or as a first try: LoRA learns more for the same size."
    )
    cost: ClassVar[str] = "Little state; keys and values longer by the virtual tokens, attention with an explicit mask."
    evidence: ClassVar[str] = ".198 by default, .416 tuned, in PEFT's comparison (GSM8K, one seed; LoRA .478)."
    composes: ClassVar[str] = (
        "Accumulation, grouped queries, sliding windows. Not packing or checkpointing; not mergeable."
    )
    default_learning_rate: ClassVar[float] = 1e-2
    few_updates_factor: ClassVar[float] = 1.0
    recomputable: ClassVar[bool] = False
    not_mergeable_because: ClassVar[str] = (
        "it trains keys and values of virtual tokens, which no weight of the base holds"
    )
    not_lora_because: ClassVar[str] = "it trains keys and values, not weights: there is no update of a matrix to write"

    name: Literal["prefix"] = Field("prefix", description="Prefix tuning.")
    projection: bool = Field(
        False,
        description="Train an encoder (embeddings and a two-layer MLP) that makes the prefix, and save what it made "
        "(sec. 4.3 of the paper: steadier, and far more to train).",
    )
    encoder_hidden_size: int | None = Field(None, ge=1, description="Width of the encoder's MLP. Default: 512.")

    def problems(self, recipe: RecipeView) -> Iterator[Problem]:
        """Yield recomputed blocks, which would read a cache that is already filled, and misfitting encoders."""
        yield from super().problems(recipe)
        if recipe.training.gradient_checkpointing not in (False, "auto"):
            yield Problem(
                ("training", "gradient_checkpointing"),
                "`gradient_checkpointing: true` cannot work with method `prefix`, which trains through the cache",
                "use `method: prompt`, or set `gradient_checkpointing: false`",
            )
        if self.encoder_hidden_size is not None and not self.projection:
            yield Problem(
                ("method", "encoder_hidden_size"),
                "`encoder_hidden_size` is the width of an encoder, and there is none",
                "set `projection: true`",
            )
        if self.projection and self._encoder < self.virtual_tokens:
            yield Problem(
                ("method", "encoder_hidden_size"),
                f"an encoder of width {self._encoder} cannot tell {self.virtual_tokens} virtual tokens apart",
                f"use {self.virtual_tokens} or more",
            )

    def refusals(self, shape: ModelShape, context: Context) -> Iterator[Problem]:
        """Yield models whose blocks differ in their keys and values, and windows that the prefix would fill."""
        yield from super().refusals(shape, context)
        width, query = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
        expected = dict.fromkeys(_SEPARATE, width) | dict.fromkeys(_FUSED, query + 2 * width)
        found = [
            linear.out_features == expected[leaf]
            for linear in shape.linears
            if (leaf := linear.name.rsplit(".", 1)[-1]) in expected
        ]
        if len(found) < shape.layers or not all(found):
            yield Problem(
                ("method", "name"),
                f"not every block of this {shape.model_type} has plain keys and values of {shape.kv_heads} heads of "
                f"{shape.head_dim}, which a prefix stands in for",
                "use `method: prompt`",
            )
        window = shape.extra["sliding_window"]
        if window is not None and self.virtual_tokens >= window:
            yield Problem(
                ("method", "virtual_tokens"),
                f"{self.virtual_tokens} virtual tokens fill the attention window of {window} tokens",
                f"use fewer than {window}",
            )

    @property
    def _encoder(self) -> int:
        return self.encoder_hidden_size or DEFAULT_ENCODER

    def resolved(self) -> Self:
        """With the encoder's width written out where there is one."""
        return self.model_copy(update={"encoder_hidden_size": self._encoder if self.projection else None})

    def adapt(self, model: nn.Module, context: Context) -> nn.Module:
        """Put trained keys and values in front; they start as those of real tokens.

        Random ones, as PEFT draws them, take most of the attention from the start. An encoder starts where it
        makes the same keys and values: its last layer is solved for them.

        Raises:
            ModelError: The model keeps other things than keys and values of one width.
        """
        import torch
        from peft import PrefixTuningConfig

        from ftune.ops.prefix import solve_last_layer

        start = self._keys_and_values(model, context)
        config = PrefixTuningConfig(
            num_virtual_tokens=self.virtual_tokens,
            prefix_projection=self.projection,
            encoder_hidden_size=self._encoder if self.projection else None,
            task_type="CAUSAL_LM",
        )
        wrapped = attach(model, config, context)
        encoder = cast(Any, wrapped).prompt_encoder["default"]
        with torch.no_grad():
            if self.projection:
                first, activation, last = encoder.transform
                inner = activation(first(encoder.embedding.weight))
                for parameter, value in zip((last.weight, last.bias), solve_last_layer(inner, start), strict=True):
                    parameter.copy_(value)
            else:
                encoder.embedding.weight.copy_(start)
        return self._remember_start(wrapped)

    def _keys_and_values(self, model: nn.Module, context: Context) -> Tensor:
        """Keys and values that the base computes for the starting tokens, packed as PEFT reads them: (V, W)."""
        import torch

        from ftune.ops.prefix import pack_prefix

        base = cast(Any, model)
        config = base.config.get_text_config()
        embedding = base.get_input_embeddings()
        ids = self.start_ids(embedding, context)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                cache = base(input_ids=ids[None], use_cache=True, logits_to_keep=1).past_key_values
        finally:
            model.train(was_training)
        pairs = [(layer.keys, layer.values) for layer in cache.layers]
        if any(tensor.shape[2] != len(ids) for pair in pairs for tensor in pair):
            raise ModelError(
                f"{config.model_type} does not keep keys and values of all {len(ids)} tokens in every block",
                help="use `method: prompt`",
            )
        return pack_prefix(pairs)

    def save(self, model: nn.Module, out: Path, context: Context) -> None:
        """Write a PEFT adapter that holds the keys and values themselves; an encoder is not needed any more."""
        save_peft(model, out, context, settings=self.stored_settings(None))

    def stored_settings(self, config: Any) -> dict[str, Any]:
        """Without an encoder."""
        return {"prefix_projection": False, "encoder_hidden_size": None}

    def trainable_parameters(self, shape: ModelShape) -> int:
        """A key and a value a block for each virtual token; with an encoder, what makes them."""
        width = shape.kv_heads * shape.head_dim
        row = 2 * shape.layers * width
        if not self.projection:
            return self.virtual_tokens * row
        return self.virtual_tokens * width + (width + 1) * self._encoder + (self._encoder + 1) * row

    def mask_cells(self, length: int, packed: bool) -> int:
        """All of it: tokens see the prefix and what stands before them."""
        return (length - self.virtual_positions) * length

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """Keys and values repeated for every query head: behind a prefix attention takes an explicit mask."""
        return 2 * shape.layers * (shape.heads - shape.kv_heads) * shape.head_dim * dtype_bytes
