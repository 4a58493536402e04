"""Tables of positions that end, found by trying a small model."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from transformers import BloomConfig, GPT2Config, GPTJConfig, GPTNeoConfig, MptConfig, OPTConfig

from ftune.errors import ModelError
from ftune.plan.positions import beyond_context, check_positions, context_of_model, positions

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (GPT2Config(n_positions=24, vocab_size=64, n_embd=32, n_layer=2, n_head=4), 24),
        (OPTConfig(max_position_embeddings=40, ffn_dim=64, word_embed_proj_dim=32, **SMALL), 40),
        (GPTNeoConfig(
            max_position_embeddings=24, vocab_size=64, hidden_size=32, num_heads=4, num_layers=2,
            attention_types=[[["global", "local"], 1]],
        ), 24),
        (GPTJConfig(n_positions=24, vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), 24),
        (MptConfig(max_seq_len=24, vocab_size=64, d_model=32, n_heads=4, n_layers=2), 24),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), None),
        (tiny.config(max_position_embeddings=24), None),
    ],
)  # fmt: skip
def test_positions_end_where_there_is_a_table(config: Any, found: int | None) -> None:
    before = config.to_json_string(use_diff=False)
    assert positions(config) == found
    assert config.to_json_string(use_diff=False) == before


def test_a_longer_row_is_refused_with_what_to_write() -> None:
    config = GPT2Config(n_positions=24, vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    check_positions(config, "base", 24)
    with pytest.raises(ModelError, match="`base` has 24 positions, and the longest row has 25 tokens") as refused:
        check_positions(config, "base", 25)
    assert "data.max_length: 24" in str(refused.value.help)
    with pytest.raises(ModelError) as refused:
        check_positions(config, "base", 20, ahead=8)
    assert "data.max_length: 16" in str(refused.value.help)
    check_positions(tiny.config(max_position_embeddings=24), "base", 400)
    assert context_of_model(config) == context_of_model(tiny.config(max_position_embeddings=24)) == 24


def test_examples_that_are_longer_than_the_model_was_made_for_are_told() -> None:
    config = tiny.config(max_position_embeddings=24)
    assert beyond_context(config, 24) == ()
    (told,) = beyond_context(config, 25)
    assert "the longest example has 25 tokens, and the model was made for 24" in told
