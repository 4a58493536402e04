"""Attention as the architecture has it: settled by the plan, told where it is not sdpa, and refused before weights."""

from __future__ import annotations

from pathlib import Path

import causal_models
import pytest
import tiny
import torch

from ftune.errors import ModelError
from ftune.plan.attention import settle_attention
from ftune.plan.base_model import load_base
from ftune.plan.resolve import resolve
from ftune.plan.shapes import build_on_meta
from ftune.plan.summary import summary_of
from ftune.plan.table import render_plan
from ftune.recipe.schema import ModelSpec


@pytest.mark.parametrize(
    ("architecture", "why"), [("bloom", "bloom has no sdpa"), ("gemma2", "gemma2 caps its attention scores")]
)
def test_where_there_is_no_sdpa_the_default_is_eager_and_the_plan_says_so(
    architecture: str, why: str, tmp_path: Path
) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    plan = resolve(causal_models.recipe(base, "lora", tmp_path).recipe)
    assert plan.recipe.model.attention == "eager"
    assert f"attention eager ({why})" in " ".join(render_plan(summary_of(plan), 200).split())
    model = load_base(plan.recipe.model, plan.recipe.method, torch.float32, torch.device("cpu"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=why) as refused:
        resolve(causal_models.recipe(base, "lora", tmp_path, model={"attention": "sdpa"}).recipe)
    assert "attention: eager" in str(refused.value.help)
    with pytest.raises(ModelError, match=why) as refused:
        resolve(causal_models.recipe(base, "longlora", tmp_path).recipe)
    assert "method: lora" in str(refused.value.help)


def test_where_there_is_sdpa_nothing_is_told(tmp_path: Path) -> None:
    plan = resolve(tiny.recipe(tmp_path).recipe)
    assert plan.recipe.model.attention == "sdpa"
    assert not [choice for choice in plan.choices if choice.field == "model.attention"]


def test_an_architecture_with_its_own_attention_classes_is_refused_under_longlora(tmp_path: Path) -> None:
    base = causal_models.make("falcon", tmp_path / "model")
    with pytest.raises(ModelError, match="falcon computes sdpa in its own way"):
        resolve(causal_models.recipe(base, "longlora", tmp_path).recipe)


def test_flash_attention_is_refused_where_the_architecture_has_none() -> None:
    kind, settings = causal_models.CONFIGS["bloom"]
    import transformers

    built = build_on_meta(getattr(transformers, f"{kind}Config")(hidden_size=64, **settings))
    spec = ModelSpec(id="x", attention="flash_attention_2")
    with pytest.raises(ModelError, match="bloom has no `attention: flash_attention_2`") as refused:
        settle_attention(spec, tiny.method("lora"), built)
    assert refused.value.help
