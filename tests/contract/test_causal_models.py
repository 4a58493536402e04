"""Methods on architectures of every kind: each cell works from the plan to the merge, or is refused by the plan."""

from __future__ import annotations

from pathlib import Path

import causal_models
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from ftune.artifacts.run_dir import RunDir
from ftune.errors import ModelError
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of

WORKS = [
    ("falcon", "dora"),  # adds to what a layer returned, in place
    ("falcon_h1", "lora"),  # reads the weight of a projection past the adapter
    ("ernie4_5_moe", "full"),  # has a parameter that does not train
    ("gemma3n_text", "lora"),  # sizes of each layer, an embedding of zeros, a branch times zero
    ("falcon_h1", "ia3"),
    ("lfm2", "galore"),
    ("gemma3, with vision", "longlora"),
    ("qwen2_vl", "galore"),
    ("smolvlm", "qlora"),
]


@pytest.mark.parametrize(("architecture", "method"), WORKS)
def test_a_method_works_from_the_plan_to_the_merge(architecture: str, method: str, tmp_path: Path) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    causal_models.run(causal_models.recipe(base, method, tmp_path))


REFUSED = [
    ("falcon", "qlora", {}, "no linear layer of torch's own kind"),
    ("mixtral", "lora", {}, "keeps its experts in one tensor"),
    ("falcon_h1", "lora", {"target_modules": ["out_proj"]}, r"reads the weight of `model.layers.0.mamba.out_proj`"),
]


@pytest.mark.parametrize(("architecture", "method", "settings", "words"), REFUSED)
def test_or_is_refused_by_the_plan(
    architecture: str, method: str, settings: dict[str, object], words: str, tmp_path: Path
) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    with pytest.raises(ModelError, match=words) as refused:
        resolve(causal_models.recipe(base, method, tmp_path, method=settings).recipe)
    assert refused.value.help


@pytest.mark.parametrize(("architecture", "method", "told"), [("falcon_h1", "lora", 1), ("falcon_h1", "full", 0)])
def test_the_plan_tells_what_all_linear_leaves_out(architecture: str, method: str, told: int, tmp_path: Path) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    warnings = summary_of(resolve(causal_models.recipe(base, method, tmp_path).recipe))["warnings"]
    found = [text for text in warnings if "mamba.out_proj" in text]
    assert len(found) == told
    assert all("leaves out 2 layers whose" in text and text.endswith("trains them") for text in found)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_language_model_alone_is_adapted_and_the_rest_is_kept(method: str, tmp_path: Path) -> None:
    base = causal_models.make("gemma3, with vision", tmp_path / "model")
    run: RunDir = causal_models.run(causal_models.recipe(base, method, tmp_path))
    before, after = (
        dict(AutoModelForImageTextToText.from_pretrained(path).named_parameters())
        for path in (base, run.root / "merged")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".language_model." in name or name == "lm_head.weight" for name in changed), changed
    if method == "lora":
        trained = load_file(run.root / "adapter/adapter_model.safetensors")
        assert all(".language_model." in name for name in trained)
    plan = run.read()["plan"]
    trained_here = sum(before[name].numel() for name in before if ".language_model." in name)
    assert method == "lora" or plan["method"]["trainable"] == trained_here


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*causal_models.CONFIGS, *causal_models.VISION])
def test_no_cell_of_the_table_fails(architecture: str, tmp_path: Path) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    methods = ("lora", "dora", "qlora", "galore", "longlora", "full")
    outcomes = {method: causal_models.outcome(base, method, tmp_path / method) for method in methods}
    assert not {method: words for method, (verdict, words) in outcomes.items() if verdict == "fails"}
