"""A tokenizer that gives tokens for which the model has no row is refused by the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from ftune.errors import ModelError
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of
from ftune.plan.tokens import require_rows


def enlarged(directory: Path, *tokens: str, special: bool = False) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(directory)
    return tokenizer


@pytest.mark.parametrize("special", [True, False])
def test_tokens_beyond_the_embedding_are_refused_with_both_sizes(special: bool, tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    enlarged(tmp_path / "base", "<|new_a|>", "<|new_b|>", "Blue", "Green", special=special)
    with pytest.raises(ModelError) as error:
        resolve(recipe)
    assert "has 263 tokens, and the model's embedding 259 rows" in error.value.message
    assert "`<|new_a|>` (259), `<|new_b|>` (260), `Blue` (261) and 1 more" in error.value.message
    assert "resize_token_embeddings" in (error.value.help or "")


def test_a_padding_token_alone_beyond_the_embedding_is_refused(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match="260 tokens, and the model's embedding 259 rows"):
        resolve(recipe)


def test_an_embedding_with_rows_to_spare_is_taken(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    tiny.model(vocab_size=320).save_pretrained(tmp_path / "base")
    assert resolve(recipe).shape.vocab == 320
    enlarged(tmp_path / "base", "Blue")
    assert resolve(recipe).shape.vocab == 320


def test_a_head_that_is_smaller_than_the_embedding_counts(tmp_path: Path) -> None:
    model: Any = tiny.model(vocab_size=300)
    model.lm_head = torch.nn.Linear(64, 200, bias=False)
    with pytest.raises(ModelError, match="259 tokens, and the model's embedding 200 rows"):
        require_rows(tiny.tokenizer(), model, "m")


def test_what_the_chat_template_writes_and_no_token_is_told(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    assert not [line for line in summary_of(resolve(recipe))["warnings"] if "chat template writes" in line]
    template = tmp_path / "other.jinja"
    template.write_text(tiny.CHATML.replace("<|im_start|>", "<|start_header_id|>"))
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"chat_template": str(template)})})
    told = [line for line in summary_of(resolve(other))["warnings"] if "chat template writes" in line]
    assert len(told) == 1
    assert "`<|start_header_id|>`" in told[0]
    assert "is 19 tokens of text" in told[0]
