"""Loss and answers from one reading: the same as from two, in fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import causal_models
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from ftune.artifacts import measure
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.generate import decoded, greedy
from ftune.artifacts.one_pass import Row, _parts, _shared, read_and_answer
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.data.batches import collate
from ftune.data.examples import Example
from ftune.run.objective import Objective

END = 2
TOKENS = 10


def row(question: str, answer: str, number: int = 0) -> Row:
    tokenizer = tiny.tokenizer()
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))["input_ids"]
    ids = np.array([*prompt, *tokenizer(f"{answer}<|im_end|>")["input_ids"]], dtype=np.int32)
    labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids).astype(np.int32)
    return Row(prompt, Example(ids, labels, number))


ROWS = [row(f"The same start, {'x' * (i * 7 % 23)}{i}", f"answer {i % 3}", i) for i in range(7)]


def objective(path: Path, name: str = "llama", **changes: Any) -> Objective:
    base = causal_models.make(name, path / "base", **changes)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return Objective(model, torch.float32).eval()


def read(of: Objective, rows: list[Row], batch_size: int = 4) -> Any:
    return read_and_answer(of, tiny.tokenizer(), rows, ends=[END], batch_size=batch_size, max_new_tokens=TOKENS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "deepseek_v3"])
def test_loss_and_answers_are_those_of_a_plain_reading(name: str, tmp_path: Path) -> None:
    of = objective(tmp_path, name)
    rows = [*ROWS, row("other", "no")]
    found = read(of, rows)
    assert found is not None
    with torch.no_grad():
        losses = [float(of(collate([[r.example]], 0))) for r in rows if r.example is not None]
    assert found.loss_sum == pytest.approx(sum(losses), rel=1e-5)
    assert found.targets == sum(r.example.target_tokens for r in rows if r.example is not None)
    prompts = [r.prompt for r in rows]
    plain = greedy(of.model, tiny.tokenizer(), prompts, dtype=torch.float32, batch_size=1, max_new_tokens=TOKENS)
    assert decoded(found.written, tiny.tokenizer(), [END]) == plain
    assert len(set(map(tuple, found.written))) > 1, "all answers alike would show nothing"


@pytest.mark.parametrize("name", ["gemma3_text", "lfm2", "qwen3_next"])
def test_a_model_that_keeps_something_else_is_measured_apart(name: str, tmp_path: Path) -> None:
    # a window shorter than the rows, convolutions, linear attention
    assert read(objective(tmp_path, name), ROWS) is None


def test_a_model_that_answers_otherwise_from_its_cache_is_measured_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = objective(tmp_path)
    monkeypatch.setattr("ftune.artifacts.one_pass.BOUND", {torch.float32: 1e-12})
    assert read(of, ROWS) is None


def test_what_all_prompts_begin_with_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = objective(tmp_path)
    count = 0
    forward = of.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += kwargs["input_ids"].numel()
        return forward(*args, **kwargs)

    monkeypatch.setattr(of.model, "forward", counting)
    read(of, ROWS)
    every = sum(len(r.ids) for r in ROWS)
    alone = min(len(r.prompt) for r in ROWS)  # read once more, in the trial
    assert count < every + alone + len(ROWS) * TOKENS
    assert _shared(ROWS) > 20


def test_shared_tokens_end_before_what_is_trained() -> None:
    assert _shared([ROWS[0]]) == 0
    same = [row("same", "yes"), row("same", "no")]
    assert _shared(same) == len(same[0].prompt) - 1, "one token of each prompt is left to begin with"
    every = [Row(r.prompt, Example(r.example.input_ids, r.example.input_ids, 0)) for r in ROWS if r.example is not None]
    assert _shared(every) == 0
    assert _shared([Row([5, 6, 7], None), Row([5, 6], None)]) == 1
    assert _shared([Row([5], None), Row([5, 6], None)]) == 0


def test_answers_that_ended_are_not_computed_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = objective(tmp_path)
    found = read(of, ROWS)
    # A token that stands early in one answer and in no other: that row alone ends there.
    first = next(i for i, tokens in enumerate(found.written) if set(tokens[:3]) - set(sum(
        (other for j, other in enumerate(found.written) if j != i), [])))  # fmt: skip
    others = set(sum((tokens for i, tokens in enumerate(found.written) if i != first), []))
    end = next(token for token in found.written[first][:3] if token not in others)
    sizes: list[int] = []
    generate = of.model.generate
    monkeypatch.setattr(of.model, "generate", lambda **k: sizes.append(len(k["input_ids"])) or generate(**k))
    again = read_and_answer(of, tiny.tokenizer(), ROWS, ends=[end], batch_size=len(ROWS), max_new_tokens=TOKENS)
    assert again is not None
    assert again.written[first][-1] == end
    assert [t for i, t in enumerate(again.written) if i != first] == [
        t for i, t in enumerate(found.written) if i != first
    ]
    assert sizes == [1, 7, 6, 6], "the trial, then four tokens at a time"


def test_forward_passes_take_rows_of_like_length() -> None:
    assert list(_parts([10] * 5)) == [5]
    assert list(_parts([3000, 3000])) == [1, 1]
    assert sum(_parts(sorted(range(50, 150)))) == 100
    assert max(_parts([1000] * 9)) == 4


def test_prompts_of_one_token_and_rows_without_an_example(tmp_path: Path) -> None:
    of = objective(tmp_path)
    found = read(of, [Row([7], None), Row([7, 8, 9], None), Row([9], None)])
    plain = greedy(
        of.model, tiny.tokenizer(), [[7], [7, 8, 9], [9]], dtype=torch.float32, batch_size=1, max_new_tokens=TOKENS
    )
    assert found is not None
    assert (found.loss_sum, found.targets) == (0, 0)
    assert decoded(found.written, tiny.tokenizer(), [END]) == plain


@pytest.mark.parametrize("method", ["lora", "full", "bottleneck", "prefix"])
def test_an_evaluation_is_the_same_in_both_ways(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"metrics": ["exact_match", "f1"], "max_new_tokens": 8, "batch_size": 3, "max_examples": 5}
    train(tiny.recipe(tmp_path, method, evaluation=wanted, training={"max_steps": 6}))
    at_once = evaluate(find_target(tmp_path / "run"), base=True)
    calls: list[Any] = []
    monkeypatch.setattr(measure, "read_and_answer", lambda *a, **k: calls.append(a))
    apart = evaluate(find_target(tmp_path / "run"), base=True)
    assert bool(calls) == (method != "prefix"), "virtual tokens stand in front of the cache"
    for who in ("base", "tuned"):
        assert at_once[who]["loss"] == pytest.approx(apart[who]["loss"], rel=1e-5)
        assert at_once[who]["target_tokens"] == apart[who]["target_tokens"]
        assert at_once[who]["metrics"] == apart[who]["metrics"]
    assert at_once["samples"] == apart["samples"]
