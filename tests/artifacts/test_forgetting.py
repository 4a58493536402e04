"""What a run has forgotten: the losses of the model's own, KL from the definition, and the likeliest continuation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from ftune.artifacts import forgetting
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.forgetting import Probe, forgotten, probe
from ftune.artifacts.report import evaluation_table
from ftune.artifacts.training import train
from ftune.artifacts.tuned import reading

SMALL = {
    "texts": ["The river rises in the hills.", "A cat sat on the mat, and slept."],
    "choices": [{"question": "One and one is", "options": ["two.", "three hundred.", "green.", "a."], "answer": 0}],
}


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "_neutral", lambda: SMALL)


@torch.no_grad()
def test_losses_are_the_models_own() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    found = probe(model, tokenizer, torch.float32)
    for text, loss, count in zip(SMALL["texts"], found.losses, found.tokens, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert loss == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
        assert count == ids.shape[1] - 1


@torch.no_grad()
def test_the_continuation_of_the_highest_probability_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    question = SMALL["choices"][0]
    scores = []
    for option in question["options"]:
        ids = torch.tensor([tokenizer(f"{question['question']} {option}")["input_ids"]])
        before = len(tokenizer(question["question"])["input_ids"])
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(float(log_probs.gather(1, ids[0, 1:, None])[before - 1 :].sum()))
    likeliest = int(np.argmax(scores))
    for answer in range(4):
        changed = {**SMALL, "choices": [{**question, "answer": answer}]}
        monkeypatch.setattr(forgetting, "_neutral", lambda changed=changed: changed)
        assert bool(probe(model, tokenizer, torch.float32).right[0]) == (answer == likeliest)


def test_a_model_has_forgotten_nothing_of_itself_and_another_has() -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    base = probe(model, tokenizer, torch.float32)
    same = forgotten(base, base)
    assert same["kl"] == 0
    assert same["loss"] == [0, 0, 0]
    unasked = probe(model, tokenizer, torch.float32, questions=False)
    assert forgotten(unasked, unasked)["loss"] == [0, 0, 0]
    assert "choices" not in forgotten(unasked, unasked)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    other = forgotten(base, probe(model, tokenizer, torch.float32))
    assert other["kl"] > 0
    assert other["loss"][1] <= other["loss"][0] <= other["loss"][2]


def test_kl_of_some_positions_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    every = probe(model, tokenizer, torch.float32)
    assert len(every.log_probs) == every.tokens.sum()
    monkeypatch.setattr(forgetting, "KL_BYTES", every.log_probs.numel() * 4 // 3 + 1)
    some = probe(model, tokenizer, torch.float32)
    # Every third position of all texts behind each other.
    assert torch.equal(some.log_probs, every.log_probs[::3])
    assert len(some.log_probs) < len(every.log_probs) / 2


def test_the_interval_covers_what_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        tokens = generator.integers(80, 200, 40)
        change = generator.normal(0.05, 0.02, 40)
        base = Probe(np.zeros(40), tokens, torch.zeros(1, 2), np.zeros(2, dtype=bool))
        tuned = Probe(change, tokens, torch.zeros(1, 2), np.zeros(2, dtype=bool))
        _, lo, hi = forgotten(base, tuned)["loss"]
        hits += lo <= 0.05 <= hi
    assert hits >= 0.9 * 300


@pytest.mark.parametrize("name", ["lora", "prompt", "full"])
def test_eval_measures_it_against_the_base(name: str, tmp_path: Path) -> None:
    train(tiny.recipe(tmp_path, name))
    with reading(tmp_path / "run") as target:
        result = evaluate(target, base=False, forgetting=True)
    found = result["forgetting"]
    base = probe(tiny.model().eval(), tiny.tokenizer(), torch.float32)
    assert found["base"]["loss"] == pytest.approx(float(np.average(base.losses, weights=base.tokens)), rel=1e-5)
    assert found["kl"] > 0
    assert "base" not in result
    assert json.loads((tmp_path / "run/eval.json").read_text())["forgetting"] == found
    assert "KL from the base" in evaluation_table(result, 80)


def test_what_ships_is_whole() -> None:
    text = (Path(forgetting.__file__).parent / "neutral.json").read_text(encoding="utf-8")
    shipped: dict[str, Any] = json.loads(text)
    assert len(shipped["texts"]) == 40
    assert all(len(choice["options"]) == 4 and choice["answer"] in range(4) for choice in shipped["choices"])
    assert len({choice["question"] for choice in shipped["choices"]}) == len(shipped["choices"]) == 160
