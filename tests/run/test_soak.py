"""Hundreds of steps leave no file open and no object behind; ``scripts/chaos/soak.py`` is the long version."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest
import tiny

from ftune.artifacts.training import train
from ftune.run.sinks.jsonl import JsonlSink

STEPS = 300
WARM = 100  # by then every library has loaded, and every cache is filled


def test_steps_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = psutil.Process()
    held: dict[int, tuple[int, int]] = {}
    receive = JsonlSink.receive

    def watched(self: JsonlSink, event: object) -> None:
        receive(self, event)  # type: ignore[arg-type]
        step = getattr(event, "step", 0)
        if step in (WARM, STEPS - 1) and step not in held:
            gc.collect()
            held[step] = process.num_fds(), len(gc.get_objects())

    monkeypatch.setattr(JsonlSink, "receive", watched)
    layers = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    tiny.model_dir(tmp_path / "base", **layers)
    tiny.write_chats(tmp_path / "train.jsonl", 24)
    tiny.write_chats(tmp_path / "eval.jsonl", 2, start=100)
    loaded = tiny.recipe(
        tmp_path,
        training={"max_steps": STEPS, "gradient_accumulation_steps": 1},
        # A checkpoint and an evaluation lie on both sides of each measurement.
        checkpoint={"every_steps": 60, "keep": 1},
        evaluation={"every_steps": 60},
    )
    before = process.num_fds()
    train(loaded, progress=False)
    assert process.num_fds() == before
    (files, objects), (files_later, objects_later) = held[WARM], held[STEPS - 1]
    assert files_later == files
    # One object a step would be twice as many.
    assert objects_later - objects < (STEPS - WARM) // 2
