"""Every method on every architecture: it trains, is loaded again, is merged where it can be, or is refused by name.

Tiny random models; each run goes through the plan, the loop, the run directory and the merge, as a user's would.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from architectures import tiny_config
from transformers import AutoModelForCausalLM

from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.merge import merge
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.training import train
from ftune.artifacts.tuned import Target
from ftune.errors import FtuneError
from ftune.methods import METHODS

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2"]

REFUSED: dict[tuple[str, str], str] = {
    ("qlora", "gpt2"): "Conv1D",
    ("longlora", "gemma2"): "caps its attention scores",
}
"""Method and architecture, and words of the refusal."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the directory of a tiny random model, once for each architecture."""
    root = tmp_path_factory.mktemp("bases")

    def make(architecture: str) -> Path:
        where = root / architecture
        if not where.exists():
            torch.manual_seed(0)
            config = tiny_config(architecture, vocab_size=len(tiny.tokenizer()))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim >= 2:
                        parameter.mul_(3)
            model.save_pretrained(where)
            tiny.tokenizer().save_pretrained(where)
        return where

    return make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", METHODS)
def test_trains_loads_and_merges(name: str, architecture: str, base: Callable[[str], Path], tmp_path: Path) -> None:
    # gemma2 caps its attention scores, which sdpa cannot do
    attention = "eager" if architecture == "gemma2" else "sdpa"
    loaded = tiny.recipe(
        tmp_path,
        name,
        model={"id": str(base(architecture)), "attention": attention},
        data={"max_length": 128},
        training={"max_steps": 4, "gradient_accumulation_steps": 1},
    )
    if (name, architecture) in REFUSED:
        with pytest.raises(FtuneError, match=REFUSED[name, architecture]) as refused:
            train(loaded)
        assert refused.value.help
        assert not (tmp_path / "run/run.json").exists(), "refused after the run began"
        return
    record = train(loaded)
    run = RunDir(tmp_path / "run")
    tuned = evaluate(Target(run.recipe(), run), base=False)["tuned"]
    assert tuned["loss"] == pytest.approx(record["measured"]["held_out_loss"], rel=1e-5)
    if METHODS[name].mergeable:
        report = merge(run, dtype="float32")
        assert report["merged_vs_adapter"]["max_error"] <= 2e-4
        assert report["base_vs_adapter"]["max_error"] > 100 * report["merged_vs_adapter"]["max_error"]
