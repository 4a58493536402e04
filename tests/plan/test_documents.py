"""Whether documents may share a row: found by the plan on a small model of the architecture."""

from __future__ import annotations

from pathlib import Path

import causal_models
import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.errors import ModelError
from ftune.plan import documents
from ftune.plan.documents import apart, keeps_documents_apart, packing_error
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.plan.table import render_plan
from ftune.recipe.schema import ModelSpec

MIXES = {"bloom", "falcon", "falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "mpt", "opt", "qwen3_next"}
KEEPS = {"deepseek_v3", "gemma3_text", "gpt2", "gpt_neox", "llama", "qwen3_moe"}


@pytest.mark.parametrize("architecture", sorted(MIXES | KEEPS))
def test_the_trial_finds_what_the_model_itself_shows(architecture: str, tmp_path: Path) -> None:
    base = causal_models.make(architecture, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    error = packing_error(model, torch.float32, torch.device("cpu"), model.config.vocab_size)
    assert apart(*error) == (architecture in KEEPS)
    attention = model.config._attn_implementation
    spec = ModelSpec(id=str(base), attention=attention)
    assert keeps_documents_apart(AutoConfig.from_pretrained(base), spec) == (architecture in KEEPS)


@pytest.mark.parametrize(
    ("kind", "keeps"), [("Llama", True), ("Mixtral", True), ("DeepseekV3", True), ("FalconH1", False), ("OPT", False)]
)
def test_a_model_of_full_size_is_tried_small(kind: str, keeps: bool) -> None:
    config = getattr(transformers, f"{kind}Config")()  # billions of parameters
    before = config.to_dict()
    random = torch.get_rng_state()
    assert keeps_documents_apart(config, ModelSpec(id="x", attention="sdpa")) is keeps
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_auto_falls_back_by_itself_and_says_so(tmp_path: Path) -> None:
    base = causal_models.make("opt", tmp_path / "model")
    loaded = causal_models.recipe(base, "lora", tmp_path)
    plan = resolve(loaded.recipe)
    assert plan.recipe.data.packing is False
    assert not plan.may_lie_flat
    assert all(len(row) == 1 for row in plan.rows)
    line = "packing false (opt mixes documents that share a row)"
    assert line in " ".join(render_plan(summary_of(plan), 200).split())
    with pytest.raises(ModelError, match="opt does not keep documents apart") as refused:
        resolve(causal_models.recipe(base, "lora", tmp_path, data={"packing": True}).recipe)
    assert "data.packing" in str(refused.value.help)
    asked = resolve(causal_models.recipe(base, "lora", tmp_path, data={"packing": False}).recipe)
    assert not [choice for choice in asked.choices if choice.field == "data.packing"]
    # What was settled is the run's: on resuming, and where the recipe is evaluated.
    assert train(loaded, progress=False)["status"] == "finished"
    assert RunDir(tmp_path / "run").as_begun(loaded.recipe).data.packing is False
    loaded.path.write_text(loaded.text)
    assert find_target(loaded.path).run is not None


def test_what_cannot_be_tried_is_not_packed_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = causal_models.make("llama", tmp_path / "model")
    monkeypatch.setattr(documents, "_small", lambda config: iter(()))
    monkeypatch.setattr(documents, "_known", {})
    plan = resolve(causal_models.recipe(base, "lora", tmp_path).recipe)
    assert plan.recipe.data.packing is False
    assert "not tried" in render_plan(summary_of(plan), 200)
    asked = resolve(causal_models.recipe(base, "lora", tmp_path, data={"packing": True}).recipe)
    assert any(len(row) > 1 for row in asked.rows)
