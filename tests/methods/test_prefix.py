"""Prefix tuning's own: the encoder, what it refuses. See also test_virtual_tokens.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from architectures import tiny_config
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DeepseekV2Config, FalconConfig

from ftune.artifacts.training import train
from ftune.errors import ModelError, RecipeError
from ftune.memory.advice import what_to_change
from ftune.memory.estimate import estimate
from ftune.methods import OptimizerSpec
from ftune.ops.prefix import solve_last_layer
from ftune.plan.shapes import read_shape
from ftune.recipe import require

ENCODER: dict[str, Any] = {"projection": True, "encoder_hidden_size": 32}


def test_the_last_layer_is_solved_exactly_and_with_the_least_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    inner, wanted = torch.randn(5, 9, generator=generator), torch.randn(5, 12, generator=generator)
    weight, bias = solve_last_layer(inner, wanted)
    assert (inner @ weight.T + bias - wanted).abs().max() <= 1e-5
    # Nothing of the weight lies outside of what the five rows span.
    assert torch.linalg.matrix_rank(torch.cat([inner, weight]), tol=1e-4) == 5


def test_an_encoder_starts_where_the_plain_prefix_starts() -> None:
    plain, encoded = (
        tiny.method("prefix", **settings).adapt(tiny.model().requires_grad_(False), tiny.context())
        for settings in ({}, ENCODER)
    )
    assert (tiny.logits(plain) - tiny.logits(encoded)).abs().max() <= 1e-3
    assert sum(p.requires_grad for p in plain.parameters()) == 1
    assert sum(p.requires_grad for p in encoded.parameters()) == 5


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("settings", [{}, ENCODER])
def test_predicted_parameters_are_the_actual_ones(kind: str, settings: dict[str, Any]) -> None:
    method = tiny.method("prefix", **settings)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).requires_grad_(False)
    actual = sum(p.numel() for p in method.adapt(model, tiny.context()).parameters() if p.requires_grad)
    assert actual == method.trainable_parameters(read_shape(tiny_config(kind)))


def test_a_trained_encoder_is_saved_as_the_prefix_it_makes(tmp_path: Path) -> None:
    """Resumed from a checkpoint that holds the encoder; loaded by plain PEFT without it."""
    record = train(tiny.recipe(tmp_path, "prefix", method=ENCODER))
    checkpoint = load_file(tmp_path / "run/checkpoints/step-4/trained.safetensors")
    assert sum(".transform." in name for name in checkpoint) == 4
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {"prompt_embeddings": (20, 2 * 2 * 32)}
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["prefix_projection"] is False
    # The trained encoder, put together again from the checkpoint, computes as what PEFT loads.
    method = tiny.method("prefix", **ENCODER)
    model = method.adapt(tiny.model().requires_grad_(False), tiny.context())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(checkpoint[name])
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "run/adapter"))
    assert (tiny.logits(loaded) - tiny.logits(model)).abs().max() <= 1e-4
    vitals = method.vitals(model, method.optimizer(model, OptimizerSpec()))
    assert vitals["moved_min"] > 0
    assert record["vitals"]["moved_min"] > 0


def test_weight_decay_leaves_the_prefix_of_an_encoder_where_it_starts() -> None:
    method = tiny.method("prefix", **ENCODER)
    model = method.adapt(tiny.model().requires_grad_(False), tiny.context())
    optimizer = method.optimizer(model, OptimizerSpec(learning_rate=1e-2, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert method.vitals(model, optimizer)["moved_min"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"gradient_checkpointing": True}}, "trains through the cache"),
        ({"method": {"encoder_hidden_size": 32}}, "there is none"),
        ({"method": {"projection": True, "encoder_hidden_size": 19}}, "cannot tell 20 virtual tokens apart"),
    ],
)
def test_what_cannot_work_is_refused_while_parsing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        require(tiny.recipe(tmp_path, "prefix", **changes))


def refusals(config: Any, **settings: Any) -> list[str]:
    method = tiny.method("prefix", **settings)
    return [problem.message for problem in method.refusals(read_shape(config), tiny.context(max_length=64))]


def test_a_prefix_that_fills_the_attention_window_is_refused() -> None:
    assert not refusals(tiny_config("mistral", sliding_window=21))
    [message] = refusals(tiny_config("mistral", sliding_window=20))
    assert "fill the attention window of 20" in message


def test_blocks_without_plain_keys_and_values_are_refused() -> None:
    """Falcon's one key head is not in its configuration's usual place; DeepSeek caches something smaller."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
    assert not refusals(FalconConfig(**sizes, multi_query=False))
    for config in (FalconConfig(**sizes, multi_query=True), DeepseekV2Config(**sizes, intermediate_size=96)):
        [message] = refusals(config)
        assert "plain keys and values" in message


def test_a_cache_that_forgets_the_start_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gemma3_text", sliding_window=16)).requires_grad_(False)
    with pytest.raises(ModelError, match="gemma3_text does not keep keys and values of all 20 tokens"):
        tiny.method("prefix").adapt(model, tiny.context())


def test_the_plan_does_not_advise_what_is_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path, "prefix").recipe
    settings: dict[str, Any] = {
        "dtype_bytes": 4,
        "rows": 4,
        "length": 4096,
        "target_tokens": 64,
        "device_type": "cpu",
    }
    advice = {
        name: "\n".join(
            what_to_change(estimate(tiny.request(tiny.method(name), read_shape(tiny.config()), **settings)), 1, recipe)
        )
        for name in ("prefix", "prompt")
    }
    assert "gradient_checkpointing" in advice["prompt"]
    assert "gradient_checkpointing" not in advice["prefix"]
    assert "micro_batch_size" in advice["prefix"]
