"""What the card says of loading is run as it stands, by who has transformers and PEFT alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import causal_models
import pytest

from ftune.artifacts.training import train


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("architecture", "loads"),
    [("falcon_h1", "FalconH1ForCausalLM"), ("gemma3, with vision", "Gemma3ForConditionalGeneration")],
)
def test_the_snippet_loads_what_was_trained(
    architecture: str, loads: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = causal_models.make(architecture, tmp_path / "model")
    loaded = causal_models.recipe(base, method, tmp_path, training={"max_steps": 1})
    train(loaded, progress=False)
    artifact = tmp_path / "run" / loaded.recipe.method.artifact
    (snippet,) = re.findall(r"```python\n(.*?)```", (artifact / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(base.parent)  # of a local base the card names the last component only
    found: dict[str, Any] = {}
    exec(snippet.replace("DIRECTORY", str(artifact)), found)
    model = found["model"]
    assert type(model.get_base_model() if method == "lora" else model).__name__ == loads
    if method == "lora":
        trained = [weight for name, weight in model.named_parameters() if "lora_B" in name]
        assert trained
        assert all(weight.any() for weight in trained)
