"""The loop in one file computes what ftune computes."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel

from ftune.artifacts.training import train

LOOP: Any = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples/minimal_loop.py")))
SETTINGS = LOOP.Settings(
    rank=4, alpha=8, learning_rate=1e-2, epochs=2, rows_per_update=4, rows_per_micro_batch=2, max_length=64
)


def test_the_losses_are_those_of_ftune(tmp_path: Path) -> None:
    loaded = tiny.recipe(
        tmp_path,
        "lora",
        data={"packing": False, "max_length": 64},
        training={"max_steps": None, "epochs": 2, "gradient_accumulation_steps": 4},
    )
    train(loaded)
    expected = [event["loss"] for event in tiny.events(tmp_path / "run", "step")]

    model = tiny.model()
    adapted = LOOP.add_lora(model, SETTINGS)
    start = tiny.method("lora", alpha=8).adapt(tiny.model(), tiny.context())
    for name, layer in adapted.items():
        layer.A_RI.data = start.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data
    rows = LOOP.read_rows(tmp_path / "train.jsonl", tiny.tokenizer(), SETTINGS.max_length)
    assert len(expected) == 12
    assert list(LOOP.train(model, rows, SETTINGS)) == pytest.approx(expected, rel=1e-5)


def test_peft_loads_what_it_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, data = tiny.model_dir(tmp_path / "base"), tiny.write_chats(tmp_path / "train.jsonl", 8)
    LOOP.main(str(base), str(data), str(tmp_path / "out"), SETTINGS)
    assert "step 4  loss" in capsys.readouterr().out
    tuned = tiny.logits(PeftModel.from_pretrained(tiny.model(), tmp_path / "out"))
    assert (tuned - tiny.logits(tiny.model())).abs().max() > 0.1
    model = tiny.model()
    adapted = LOOP.add_lora(model, SETTINGS)
    list(LOOP.train(model, LOOP.read_rows(data, tiny.tokenizer(), SETTINGS.max_length), SETTINGS))
    assert adapted
    torch.testing.assert_close(tuned, tiny.logits(model), atol=1e-4, rtol=0)
