"""What agrees with a study that was begun elsewhere, and what does not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from ftune.experiments.drift import Anchor, Environment, environments, keep_environments
from ftune.experiments.settle import Settled
from ftune.experiments.trials import Trials
from ftune.experiments.tuning import grid

TRIAL = grid(1e-3, 3, {})[0].name


def write(where: Path, *, loss: float = 2.0, right: int = 5, lora: float = 1.5, trial: str = "") -> None:
    """Ten answers of a base and three steps of LoRA, as a study or its anchor keeps them."""
    base = where / ("tests/base" if trial else "base")
    base.mkdir(parents=True)
    (base / "eval.json").write_text(json.dumps({"base": {"loss": loss}}))
    answers = [{"answer": "", "scores": {"f1": float(row < right)}} for row in range(10)]
    rows = [{"row": row, "prompt": "", "reference": "", "base": answer} for row, answer in enumerate(answers)]
    (base / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = where / (f"runs/lora/{trial}" if trial else "lora")
    run.mkdir(parents=True)
    steps = [{"event": "step", "step": step, "loss": lora / step} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))


def anchor(where: Path, dtype: str) -> Anchor:
    common = {"model.dtype": dtype}
    asked = {"trials": 3, "search": {}}
    settled = Settled(asked, common, {}, 8, 1.0, "f1", 0, {}, {"test": 10}, [], {"lora": 1e-3}, {})
    return Anchor(Trials(where, tiny.recipe(where, "lora"), common, {}, "f1", 0), settled)


@pytest.mark.parametrize(
    ("now", "dtype", "said"),
    [
        ({}, "float32", None),
        ({"lora": 1.50012, "loss": 2.00012}, "float32", None),
        ({"lora": 1.5005}, "float32", "LoRA's loss at step 1"),
        ({"lora": 1.502}, "bfloat16", None),
        ({"lora": 1.506}, "bfloat16", "LoRA's loss at step 3"),
        ({"lora": float("nan")}, "float32", "LoRA's loss"),
        ({"loss": 2.01}, "float32", "the base's loss"),
        ({"right": 6}, "float32", None),
        ({"right": 3}, "float32", "50.0 % then, 30.0 % now"),
    ],
)
def test_an_anchor_agrees_up_to_rounding(now: dict[str, Any], dtype: str, said: str | None, tmp_path: Path) -> None:
    write(tmp_path, trial=TRIAL)
    write(tmp_path / "anchor", **now)
    found = anchor(tmp_path, dtype).differences()
    assert said in "\n".join(found) if said else not found


def test_only_what_was_kept_is_computed_again(tmp_path: Path) -> None:
    assert not anchor(tmp_path, "float32").jobs()
    write(tmp_path, trial=TRIAL)
    assert [(job.label, job.message["kind"]) for job in anchor(tmp_path, "float32").jobs()] == [
        ("base", "test"),
        ("lora", "train"),
    ]


def test_an_environment_holds_for_a_day(tmp_path: Path) -> None:
    then = replace(Environment.here(), checked="2026-01-01T12:00:00+00:00")
    assert then.holds(replace(then, checked="2026-01-02T11:00:00+00:00"))
    assert not then.holds(replace(then, checked="2026-01-02T13:00:00+00:00"))
    other = replace(then, versions={**then.versions, "torch": "0.1"})
    assert not other.holds(then)
    assert "torch 0.1 then" in other.told_beside(then)
    assert not replace(then, processor="other").holds(then)
    keep_environments(tmp_path, [then, other])
    assert environments(tmp_path) == [then, other]
