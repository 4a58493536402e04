"""Tiny random models of fifty architectures, and a run of a method on one of them, from the plan to the merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import Target
from ftune.errors import FtuneError

SIZES: dict[str, Any] = {
    "vocab_size": len(tiny.tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 2}
_GROUPED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {}),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 2}),
    "codegen": ("CodeGen", {**_GPT, "rotary_dim": 8}),
    "cohere2": ("Cohere2", {}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_GROUPED_EXPERTS,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "ernie4_5_moe": ("Ernie4_5_Moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "exaone4": ("Exaone4", {}),
    "falcon": ("Falcon", {"new_decoder_architecture": False}),
    "falcon_h1": (
        "FalconH1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 32,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 32}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 16, "sliding_window": 32}),
    "gemma3n_text": (
        "Gemma3nText",
        {
            "head_dim": 16,
            "sliding_window": 32,
            "vocab_size_per_layer_input": SIZES["vocab_size"],
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4_text": (
        "Gemma4Text",
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 32,
            "vocab_size_per_layer_input": SIZES["vocab_size"],
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 0,
        },
    ),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4_moe": ("Glm4Moe", {**_GROUPED_EXPERTS, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16}),
    "gpt2": ("GPT2", _GPT),
    "gpt_bigcode": ("GPTBigCode", _GPT),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 32},
    ),
    "granite": ("Granite", {}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
        },
    ),
    "helium": ("Helium", {"head_dim": 16}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", {"head_dim": 16}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "llama": ("Llama", {}),
    "llama4_text": (
        "Llama4Text",
        {"intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 16},
    ),
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "nemotron": ("Nemotron", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "phimoe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_5_text": ("Qwen3_5Text", _LINEAR_ATTENTION),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 16, **_MOE}),
    "qwen3_next": ("Qwen3Next", {**_LINEAR_ATTENTION, "shared_expert_intermediate_size": 32, **_MOE}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, layers without positions": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("StableLm", {}),
    "starcoder2": ("Starcoder2", {}),
}
"""Architectures by the names of their rows in the table: transformers' configuration class, and its settings."""

_NAMED_OTHERWISE: dict[str, tuple[str, ...]] = {
    "bloom": ("num_hidden_layers", "num_attention_heads"),
    **dict.fromkeys(
        ("codegen", "gpt2", "gpt_bigcode", "mpt"),
        (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "max_position_embeddings",
        ),
    ),
}
"""Sizes that a configuration has under other names."""


_TEXT: dict[str, Any] = {
    "vocab_size": len(tiny.tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_PATCHES = {"image_size": 32, "patch_size": 8}

VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3, with vision": (
        "Gemma3",
        {
            "text_config": {**_TEXT, "head_dim": 16},
            "vision_config": {**_VISION, **_PATCHES},
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
            "image_token_id": 5,
            "video_token_id": 6,
            "vision_start_token_id": 7,
            "vision_end_token_id": 8,
        },
    ),
    "smolvlm": (
        "SmolVLM",
        {
            "text_config": {"model_type": "llama", **_TEXT, "pad_token_id": 0},
            "vision_config": {**_VISION, **_PATCHES},
            "image_token_id": 5,
            "pad_token_id": 0,
        },
    ),
}
"""Models that see images, too."""


def make(name: str, where: Path, **changes: Any) -> Path:
    """Save a tiny random model, with weights large enough to matter, and its tokenizer."""
    if name in VISION:
        kind, settings = VISION[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**settings)
        return save(AutoModelForImageTextToText.from_config(config, dtype=torch.float32), where)
    kind, settings = CONFIGS[name]
    common = {key: value for key, value in SIZES.items() if key not in _NAMED_OTHERWISE.get(name, ())}
    config = getattr(transformers, f"{kind}Config")(**common | settings | changes)
    torch.manual_seed(0)
    return save(AutoModelForCausalLM.from_config(config, dtype=torch.float32), where)


def save(model: Any, where: Path) -> Path:
    """Save a random model with weights large enough to matter, and the tests' tokenizer."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
    model.save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


SETTINGS: dict[str, dict[str, Any]] = {"longlora": {"group_size": 16}}


def recipe(base: Path, method: str, where: Path, /, **blocks: Any) -> Any:
    """A recipe of three updates on a model, over short chats that share rows where they may."""
    where.mkdir(parents=True, exist_ok=True)
    (where / "base").mkdir(exist_ok=True)  # tiny.recipe makes its own otherwise
    tiny.write_chats(where / "train.jsonl", 10)
    tiny.write_chats(where / "eval.jsonl", 3, start=100)
    own: dict[str, Any] = {
        "model": {"id": str(base)},
        "method": SETTINGS.get(method, {}),
        "data": {"max_length": 160},
        "training": {"max_steps": 3, "gradient_accumulation_steps": 1},
    }
    for name, block in blocks.items():
        own[name] = {**own.get(name, {}), **block}
    return tiny.recipe(where, method, **own)


def run(loaded: Any, show_plan: Callable[[dict[str, Any]], None] = lambda summary: None) -> RunDir:
    """Train, read back, evaluate and merge; hold that each finds the model that was trained."""
    record = train(loaded, progress=False, show_plan=show_plan)
    run = RunDir(Path(loaded.recipe.output_dir))
    tuned = evaluate(Target(run.recipe(), run), base=False)["tuned"]
    trained = record["measured"]["held_out_loss"]
    assert abs(tuned["loss"] - trained) <= 1e-5 * trained, f"eval finds a loss of {tuned['loss']}, training {trained}"
    if loaded.recipe.method.mergeable:
        report = merge(run, dtype="float32")
        error, effect = report["merged_vs_adapter"]["max_error"], report["base_vs_adapter"]["max_error"]
        assert error <= 2e-4, f"merged, a logit is off by {error}"
        assert effect > 100 * error, f"training changed the logits by {effect}, merging by {error}"
        read_plainly(run.root / "merged")
    return run


def read_plainly(directory: Path) -> Any:
    """Read a model as any user of transformers does; hold that nothing is left over and nothing made up."""
    sees = "vision_config" in AutoConfig.from_pretrained(directory).sub_configs
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    model, report = auto.from_pretrained(str(directory), output_loading_info=True)
    assert not any(report.values()), f"plainly read: { {key: sorted(map(str, report[key])) for key in report} }"
    return model.eval()


def outcome(base: Path, method: str, where: Path, **blocks: Any) -> tuple[str, str]:
    """What becomes of a method on a model.

    Returns:
        ``works`` and what the plan says of it; ``refused``, by the plan, in its words; or ``fails``, and how.
    """
    planned: list[dict[str, Any]] = []
    try:
        run(recipe(base, method, where, **blocks), planned.append)
    except Exception as error:
        if isinstance(error, FtuneError) and not planned:
            return "refused", f"{error} ({error.help})"
        return "fails", f"{type(error).__name__}: {error}"
    return "works", "; ".join(planned[0]["warnings"])
