"""The tokens that end a turn, found in what is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ftune.data.stops import learned_ends, template_end
from ftune.data.tokenize import load_splits
from ftune.recipe.schema import DataSpec


def tokenizer_of(template: str, *tokens: str, special: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with some added tokens; the first one is its end of sequence."""
    names = ["<|endoftext|>", *tokens]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*names, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([names[0]])
    raw.add_tokens([AddedToken(name, special=special) for name in tokens])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=names[0], pad_token=names[0])
    made.chat_template = template
    return made


def ends_of(path: Path, tokenizer: Any, rows: list[list[dict[str, Any]]], **settings: Any) -> list[str]:
    file = path / "train.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    spec = DataSpec.model_validate({"train": {"path": str(file)}, **settings})
    ids = learned_ends(load_splits(spec, tokenizer, 7).train, tokenizer, spec)
    return [tokenizer.convert_ids_to_tokens(i) for i in ids]


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("special", [True, False])
def test_the_template_s_end_and_not_the_tokenizer_s(tmp_path: Path, train_on: str, special: bool) -> None:
    tokenizer = tokenizer_of(tiny.CHATML, "<|im_start|>", "<|im_end|>", special=special)
    rows = [turns("a", "b", "c", "d"), turns("a", "b")]
    assert ends_of(tmp_path, tokenizer, rows, train_on=train_on) == ["<|im_end|>"]
    if special:
        assert tokenizer.convert_ids_to_tokens(template_end(tokenizer)) == ["<|im_end|>"]


HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.thinking is defined and loop.last %}"
    "<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "{% if m.tool_calls is defined %}<|channel|>call<|message|>{{ m.tool_calls }}<|call|>"
    "{% else %}<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% endgeneration %}{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")


def test_several_ends(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(HARMONY, *HARMONY_TOKENS)
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [turns("a", "b", "c", "d"), [turns("a")[0], call]]
    # an earlier turn is shown with <|end|>, which the model does not write there: it is not trained
    assert set(ends_of(tmp_path, tokenizer, rows)) == {"<|return|>", "<|call|>"}


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_a_token_between_reasoning_and_answer_ends_no_turn(tmp_path: Path, train_on: str) -> None:
    tokenizer = tokenizer_of(HARMONY, *HARMONY_TOKENS)
    row = turns("a", "b")
    row[1]["thinking"] = "hm"
    assert ends_of(tmp_path, tokenizer, [row, row], train_on=train_on) == ["<|return|>"]


def test_a_token_that_one_row_happens_to_quote_still_ends_turns(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny.CHATML, "<|im_start|>", "<|im_end|>")
    rows = [turns("a", "b") for _ in range(40)] + [turns("a", "ChatML writes <|im_end|> there")]
    assert ends_of(tmp_path, tokenizer, rows) == ["<|im_end|>"]


def test_a_turn_that_ends_in_plain_text_teaches_no_stop_token(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert ends_of(tmp_path, tokenizer_of(template), [turns("a", "b")]) == []
    assert template_end(tokenizer_of(template)) == ()


def test_cut_examples_do_not_invent_an_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny.CHATML, "<|im_start|>", "<|im_end|>")
    rows = [turns("a", "b"), turns("a", "b" * 200)]
    assert ends_of(tmp_path, tokenizer, rows, max_length=64) == ["<|im_end|>"]
