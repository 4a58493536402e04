"""What serves a method's result, by the rules that each engine publishes (late 2026). Nothing is tried here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftune.methods import Method

__all__ = ["RULES", "served"]

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``max_lora_rank``; an adapter of a higher rank is refused."""
RULES = (
    "vLLM and llama.cpp are told of by the rules that they publish, and were not tried. vLLM serves LoRA adapters of "
    "rank 512 or less, no DoRA, no whole modules (`modules_to_save`). llama.cpp takes a LoRA adapter with `--lora`, "
    "and models, as GGUF. Ollama takes no adapter: merge, convert to GGUF, `FROM file.gguf`."
)


def served(method: type[Method], adapter: Mapping[str, Any] | None) -> dict[str, str]:
    """How vLLM and llama.cpp come to serve it; ``no`` where they do not.

    Args:
        method: Its class, which says what its update is.
        adapter: ``adapter_config.json`` of a run, where it has one.
    """
    if method.artifact == "model":
        return {"vllm": "as it is", "llama.cpp": "as GGUF"}
    if method.as_lora == "already" and adapter is not None:
        rank = max(adapter["r"], *(adapter.get("rank_pattern") or {}).values(), 0)
        limit = next((limit for limit in VLLM_RANKS if rank <= limit), None)
        if limit is not None and not adapter.get("use_dora") and not adapter.get("modules_to_save"):
            return {"vllm": f"adapter, rank {limit}", "llama.cpp": "adapter as GGUF"}
    elif method.as_lora in ("exact", "approximate"):
        about = "" if method.as_lora == "exact" else ", roughly"
        return {"vllm": f"converted{about}", "llama.cpp": f"converted{about}"}
    how = "merged" if method.mergeable else "no"
    return {"vllm": how, "llama.cpp": how}
