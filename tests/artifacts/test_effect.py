"""Whether a run made its model better is told by losses, before and after, with what to change."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from run.test_loop import train_until
from transformers import AutoModelForCausalLM

from ftune.artifacts.effect import effect_of, trend
from ftune.artifacts.report import training_summary
from ftune.artifacts.training import train
from ftune.cli import main
from ftune.errors import Interrupted
from ftune.run.loop import Loop

TRAINING = {"steps": 40, "epochs": 6.0, "learning_rate": 1e-3}
FALLING = [4.0, 3.0, 2.0, 1.0]


def test_advice_on_the_rate_knows_the_usual_one_and_asks_for_no_fewer_epochs() -> None:
    training = {"steps": 108, "epochs": 9.0, "learning_rate": 1e-6, "usual_learning_rate": 6e-4}
    found = effect_of(training, FALLING, [(0, 3.8), (108, 3.79)], 3.8)
    assert found["advice"] == ["try a higher rate, `optimizer.learning_rate: 0.0006`"]
    few = effect_of(training | {"steps": 9}, FALLING, [(0, 3.8), (9, 3.79)], 3.8)["advice"]
    assert few[1] == "or more updates than 9: `training.epochs: 100`"
    high = effect_of(training | {"learning_rate": 1.0}, [3.8, 14.0], [(0, 3.8), (108, 9.0)], 3.8)
    assert "try `optimizer.learning_rate: 0.0006`" in high["advice"][0]


def test_a_trend_is_a_mean_of_many_updates() -> None:
    assert trend([1.0]) is None
    assert trend([4.0, 3.0, 1.0]) == (4.0, 1.0)
    assert trend([2.0, 4.0] + [9.0] * 16 + [1.0, 0.0]) == (3.0, 0.5)


@pytest.mark.parametrize(
    ("losses", "held_out", "base", "verdict", "advice"),
    [
        (FALLING, [(0, 3.8), (40, 0.8)], 3.8, "better", []),
        (FALLING, [(0, 3.8), (40, 3.79)], 3.8, "hardly_moved", ["learning_rate: 0.005", "training.epochs: 15"]),
        (FALLING, [(0, 3.8), (40, 4.5)], 3.8, "worse", ["by heart", "training.epochs: 2", "learning_rate: 0.00033"]),
        (FALLING, [(0, 3.8), (20, 2.5), (30, 3.0), (40, 4.5)], 3.8, "worse", ["after step 20 it was 2.5000"]),
        ([3.8, 14.0], [(0, 3.8), (40, 12.9)], 3.8, "worse", ["rose too", "learning_rate: 0.0002"]),
        (FALLING, [(0, 3.8), (40, math.nan)], 3.8, "worse", ["by heart"]),
        (FALLING, [(40, 1.0)], None, "better", []),  # begun before the base was measured
        (FALLING, [], None, "better", []),
        ([3.0, 3.0], [], None, "worse", ["rose too"]),
        ([3.0], [], None, "unknown", []),
    ],
)
def test_losses_are_judged(
    losses: list[float], held_out: list[tuple[int, float]], base: float | None, verdict: str, advice: list[str]
) -> None:
    found = effect_of(TRAINING, losses, held_out, base)
    assert found["verdict"] == verdict
    assert bool(found["advice"]) == bool(advice)
    for part in advice:
        assert part in "; ".join(found["advice"])


@pytest.mark.parametrize("name", ["lora", "prompt", "full"])
def test_the_base_is_measured_before_the_first_update(name: str, tmp_path: Path) -> None:
    record = train(tiny.recipe(tmp_path, name))
    first, last = tiny.events(tmp_path / "run", "eval")
    assert (first["step"], last["step"]) == (0, 4)
    assert record["measured"]["base_loss"] == first["loss"]
    assert record["measured"]["held_out_loss"] == last["loss"]
    # Prompt tuning's first tokens are another model; what is measured is the base all the same.
    others = tiny.recipe(tmp_path, "lora", output_dir=str(tmp_path / "lora"))
    if name == "prompt":
        train(others)
        assert first["loss"] == pytest.approx(tiny.events(tmp_path / "lora", "eval")[0]["loss"], rel=1e-5)
    text = training_summary(record, "run", 100)
    assert f"held-out {first['loss']:.4f} -> {last['loss']:.4f}" in text
    assert "held-out loss |" not in (tmp_path / "run" / record["plan"]["method"]["artifact"] / "README.md").read_text()


def test_a_resumed_run_measures_the_base_no_second_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tiny.recipe(tmp_path, output_dir=str(tmp_path / "whole")))
    train_until(tiny.recipe(tmp_path), 2)
    record = train(tiny.recipe(tmp_path), resume=True)
    assert [event["step"] for event in tiny.events(tmp_path / "run", "eval")] == [0, 4]
    assert record["measured"]["base_loss"] == whole["measured"]["base_loss"]
    assert record["effect"] == whole["effect"]


def test_the_base_s_loss_is_kept_where_nothing_is_logged(tmp_path: Path) -> None:
    train_until(tiny.recipe(tmp_path, tracking=["progress"]), 2)
    record = train(tiny.recipe(tmp_path, tracking=["progress"]), resume=True)
    assert record["measured"]["base_loss"] > 0


def test_a_run_that_was_killed_before_its_first_checkpoint_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_backward", fail)
        with pytest.raises(Interrupted):
            train(tiny.recipe(tmp_path))
    record = train(tiny.recipe(tmp_path), resume=True)
    assert [event["step"] for event in tiny.events(tmp_path / "run", "eval")] == [0, 4]
    assert record["measured"]["base_loss"] == tiny.events(tmp_path / "run", "eval")[0]["loss"]


def test_a_run_that_began_before_bases_were_measured_goes_on(tmp_path: Path) -> None:
    train_until(tiny.recipe(tmp_path), 2)
    metrics = tmp_path / "run/metrics.jsonl"
    kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["event"] != "eval"]
    metrics.write_text("\n".join(kept) + "\n")
    checkpoint = tmp_path / "run/checkpoints/step-2"
    progress = json.loads((checkpoint / "progress.json").read_text())
    del progress["base_loss"]
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    from ftune.run.manifest import write_manifest

    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    record = train(tiny.recipe(tmp_path), resume=True)
    assert record["measured"]["base_loss"] is None
    assert record["effect"]["of"] == "training"


def test_a_model_that_became_worse_is_told_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.recipe(tmp_path)
    # As it is made, a model gives all tokens much the same probability, so that there is much to lose; and a head that
    # is trained too takes from the tokens of the held-out row, which no row for training has.
    AutoModelForCausalLM.from_config(tiny.config()).save_pretrained(tmp_path / "base")
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "q", "completion": "\u00e4\u00f6\u00fc" * 9}) + "\n")
    loaded = tiny.recipe(tmp_path, "full", optimizer={"learning_rate": 0.1}, training={"max_steps": 12})
    (tmp_path / "recipe.json").write_text(loaded.text)
    monkeypatch.setattr("sys.argv", ["ftune", "train", str(tmp_path / "recipe.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "at work" not in out
    told = " ".join(out.split())
    assert "warning: the model is worse than before training (held-out loss" in told
    assert "learned by heart" in told
    assert "`optimizer.learning_rate: 0.033`" in told


def test_nothing_held_out_is_said_before_training(tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = []
    loaded = tiny.recipe(tmp_path, data={"eval": None})
    record = train(loaded, show_plan=plans.append)
    assert any("no rows are held out" in text for text in plans[0]["warnings"])
    assert record["effect"]["of"] == "training"
    with_rows: list[dict[str, Any]] = []
    train(tiny.recipe(tmp_path), show_plan=with_rows.append, overwrite=True)
    assert not any("held out" in text for text in with_rows[0]["warnings"])
