"""S2-Attn as an attention implementation of transformers, and the counters that prove it ran."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NAME", "Groups", "groups_of", "mark", "register"]

NAME = "ftune_s2_sdpa"
"""Holds "sdpa", so that transformers refuses architectures without it; not "flash", which takes another mask."""


@dataclass
class Groups:
    """The groups of one attention layer, and what it did in training.

    Attributes:
        size: Tokens in a group.
        rows: Rows that passed in training; those recomputed by gradient checkpointing count again.
        shifted: Those among them that were longer than a group.
        groups: Groups that these fell into, counted on the heads that are not shifted.
    """

    size: int
    rows: int = 0
    shifted: int = 0
    groups: int = 0


def register() -> str:
    """Make S2-Attn known to transformers; returns the name to build a model with."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
    # Without a mask function of its own name a model gets no mask at all: packed documents would see each other.
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    return NAME


def mark(model: nn.Module, size: int) -> int:
    """Give every causal attention layer groups of ``size`` tokens; returns how many layers got them."""
    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", False)]
    for layer in layers:
        cast(Any, layer).s2_groups = Groups(size)
    return len(layers)


def groups_of(model: nn.Module) -> list[Groups]:
    """The groups of every attention layer, in order."""
    return [cast(Any, module).s2_groups for module in model.modules() if hasattr(module, "s2_groups")]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend in shifted groups while training, and as ``sdpa`` does otherwise."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from ftune.ops.s2_attention import s2_attention

    # Positions and trained embeddings are fp32, and so are query and key; sdpa would cast them after key and value
    # were copied for every head.
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    length = query.shape[2]
    groups: Groups | None = getattr(module, "s2_groups", None) if module.training else None
    if groups is not None and length == key.shape[2]:
        rows = query.shape[0]
        groups.rows += rows
        if length > groups.size:
            groups.shifted += rows
            groups.groups += rows * -(-length // groups.size)
        # Shorter rows have no border on either half of the heads.
        if length > groups.size // 2:
            out = s2_attention(query, key, value, groups.size, attention_mask, dropout=dropout, scale=scaling)
            return out, None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None
