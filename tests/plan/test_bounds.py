"""A configuration whose sizes no model has is refused before anything is built from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.errors import ModelError
from ftune.plan.base_model import load_config
from ftune.recipe.locate import locate_model
from ftune.recipe.schema import ModelSpec


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10_000_000},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -3},
        {"num_attention_heads": 0},
        {"num_key_value_heads": -1},
        {"hidden_size": 10**9},
        {"vocab_size": 10**12},
        {"intermediate_size": 10**15},
        {"head_dim": 10**9},
        {"max_position_embeddings": 10**18},
    ],
)
def test_sizes_that_no_model_has(sizes: dict[str, Any], tmp_path: Path) -> None:
    described = tiny.config().to_dict() | sizes
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="cannot be that of a model") as refused:
        load_config(ModelSpec(id=str(tmp_path)))
    assert next(iter(sizes)) in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "7", "null", "", "\x00"])
def test_a_configuration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"`config.json` of model"):
        load_config(ModelSpec(id=str(tmp_path)))


def test_a_configuration_larger_than_one_is(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ModelError, match="is larger than"):
        locate_model(ModelSpec(id=str(tmp_path)))
