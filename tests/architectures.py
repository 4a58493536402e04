"""Tiny configurations of the architectures that the planner is tested on."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 24},
    "gemma3_text": {"head_dim": 24},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}

DENSE = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2"]
ARCHITECTURES = [*DENSE, "mixtral"]


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    names = SIZES.keys()
    if architecture == "gpt2":
        names = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    elif architecture == "gpt_neox":
        names -= {"num_key_value_heads"}
    common = {name: SIZES[name] for name in names}
    config: PreTrainedConfig = AutoConfig.for_model(architecture, **common | _OWN.get(architecture, {}) | changes)
    return config
