"""--auto-batch: where memory runs out, the same update in smaller micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run.test_loop import losses, stop_after, weights

from ftune.artifacts.training import train
from ftune.errors import FtuneError, Interrupted, RunFailed
from ftune.recipe.load import Loaded
from ftune.run.objective import Objective


def holds(monkeypatch: pytest.MonkeyPatch, most: int, after: int = 1) -> None:
    """Let memory run out in a training batch of more than ``most`` rows, from the one after the first ``after`` on."""
    forward, count = Objective.forward, 0

    def bounded(self: Objective, batch: Any) -> Any:
        nonlocal count
        count += self.training
        if self.training and count > after and len(batch.rows) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, batch)

    monkeypatch.setattr(Objective, "forward", bounded)


def recipe(where: Path, flat: bool, name: str = "run", micro: int = 4) -> Loaded:
    # eager attention takes rows that are padded, sdpa lays them behind each other
    return tiny.recipe(
        where,
        model={"attention": "sdpa" if flat else "eager"},
        data={"packing": False},
        training={"micro_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "max_steps": 3},
        checkpoint={"every_steps": 1, "keep": 3},
        output_dir=str(where / name),
    )


@pytest.mark.parametrize("flat", [False, True])
def test_the_same_update_in_smaller_micro_batches(flat: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(recipe(tmp_path, flat, "whole"))
    # The second micro-batch of the first update fails: gradients of the first must not count twice.
    holds(monkeypatch, 2)
    record = train(recipe(tmp_path, flat), auto_batch=True)
    assert record["measured"]["halvings"] >= 1
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    for kind in ("whole", "run"):
        events = tiny.events(tmp_path / kind, "halved")
        assert bool(events) == (kind == "run")
        assert all(event["now"] > event["before"] for event in events)
    ones, twos = weights(tmp_path / "whole", 3), weights(tmp_path / "run", 3)
    assert all((ones[key] - twos[key]).abs().max() <= 1e-4 * ones[key].abs().max() for key in ones)


def test_what_was_found_is_kept_for_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        holds(patched, 2)
        stop_after(patched, 1)
        with pytest.raises(Interrupted):
            train(recipe(tmp_path, flat=False), auto_batch=True)
    holds(monkeypatch, 2, after=0)
    train(recipe(tmp_path, flat=False), resume=True)  # without --auto-batch, for nothing runs out any more
    progress = json.loads((tmp_path / "run/checkpoints/step-3/progress.json").read_text())
    assert progress["halvings"] == 1


def test_one_row_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, 0)
    with pytest.raises(RunFailed, match="memory ran out after 0 of"):
        train(recipe(tmp_path, flat=False), auto_batch=True)


def test_without_it_memory_that_runs_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds(monkeypatch, 2)
    with pytest.raises(RunFailed, match="memory ran out after 0 of") as failed:
        train(recipe(tmp_path, flat=False))
    assert "--auto-batch" in (failed.value.help or "")


def test_updates_in_the_backward_pass_cannot_be_made_anew(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, method={"name": "galore", "rank": 8, "per_layer": True}, optimizer={})
    with pytest.raises(FtuneError, match="an update cannot be made anew"):
        train(loaded, auto_batch=True)
    assert not (tmp_path / "run").exists()


def test_under_fsdp2_the_others_would_wait(tmp_path: Path) -> None:
    with pytest.raises(FtuneError, match="--auto-batch under fsdp2"):
        train(recipe(tmp_path, flat=True), auto_batch=True, engine="fsdp2")
    assert not (tmp_path / "run").exists()
