"""Sizes that a model can have: of a configuration that is damaged, or a stranger's, the plan would never end."""

from __future__ import annotations

from typing import Any

from ftune.errors import ModelError

__all__ = ["require_possible_sizes", "zero_sizes"]

# Least and most; well beyond any model there is.
_LIMITS: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 4_096),
    "hidden_size": (1, 2**20),
    "intermediate_size": (0, 2**24),
    "moe_intermediate_size": (0, 2**24),
    "vocab_size": (1, 2**26),
    "num_attention_heads": (1, 2**14),
    "num_key_value_heads": (0, 2**14),
    "head_dim": (0, 2**16),
    "num_experts": (0, 2**16),
    "num_local_experts": (0, 2**16),
    "n_routed_experts": (0, 2**16),
    "max_position_embeddings": (-1, 2**40),
}


def require_possible_sizes(config: Any, name: str) -> None:
    """Hold that a configuration's sizes are those of a model.

    Args:
        config: Of transformers.
        name: What the recipe calls the model.

    Raises:
        ModelError: They are not; the message names each.
    """
    text = config.get_text_config()
    wrong = []
    for field, (least, most) in _LIMITS.items():
        value = getattr(text, field, None)
        if isinstance(value, int) and not least <= value <= most:
            wrong.append(f"`{field}` is {value:,} (at least {least:,}, at most {most:,})")
    if wrong:
        raise ModelError(
            f"the configuration of model `{name}` cannot be that of a model: {'; '.join(wrong)}",
            help="correct config.json, or copy it again from where the model comes from",
        )


def zero_sizes(config: dict[str, Any]) -> str:
    """The sizes that are 0 in a configuration by which something could not be divided; "" where none is."""
    return ", ".join(f"`{field}` is 0" for field in _LIMITS if config.get(field) == 0)
