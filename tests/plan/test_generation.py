"""Settings for generation that a base comes with: odd ones work, impossible ones are refused by the plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from ftune.errors import ModelError
from ftune.methods.lora import Lora
from ftune.plan.base_model import load_base
from ftune.plan.resolve import resolve


def written(directory: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1.0, "num_beams": 0, "max_new_tokens": -3}, "`max_new_tokens` must be greater than 0"),
        ({"cache_implementation": 7}, "cannot be"),
        ("{not json", "is damaged"),
    ],
)
def test_impossible_settings_are_refused_by_the_plan(content: Any, message: str, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    written(tmp_path / "base", content)
    with pytest.raises(ModelError, match=message) as error:
        resolve(recipe)
    assert "remove it" in (error.value.help or "")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    "content", [{"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 1}, {"own_field": 1}, None]
)
def test_settings_that_contradict_each_other_and_none_are_taken(content: Any, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    if content is None:
        (tmp_path / "base/generation_config.json").unlink()
    else:
        written(tmp_path / "base", content)
    resolve(recipe)
    for dtype in (torch.float32, torch.bfloat16):
        load_base(recipe.model, Lora(), dtype, torch.device("cpu"))
