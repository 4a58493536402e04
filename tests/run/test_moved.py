"""The watch over what should move: it sees every change, and blames no weight for a step below its last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from run.test_loop import train_until

from ftune.artifacts.training import train
from ftune.errors import RunFailed
from ftune.run.moved import MoveWatch, _checksums


def watched(value: torch.Tensor, rate: float, updates: int, **settings: Any) -> MoveWatch:
    """A watch over one parameter that an optimizer forgot."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(value)
    watch = MoveWatch(model, **settings)
    for _ in range(updates):
        model.weight.grad = torch.ones_like(model.weight)
        watch.after_update(model, last=False, learning_rate=rate)
    return watch


def test_two_changes_that_cancel_are_seen() -> None:
    before = torch.ones(64)
    after = before.clone()
    after.view(torch.int32)[3] += 1
    after.view(torch.int32)[7] -= 1
    sums = _checksums({"before": before, "after": after, "copy": before.clone()})
    assert sums["before"] == sums["copy"] != sums["after"]


def test_a_weight_that_should_show_its_updates_fails() -> None:
    with pytest.raises(RunFailed, match="did not move in 3 updates"):
        watched(torch.ones(8), 1e-5, 3)
    with pytest.raises(RunFailed, match="did not move"):
        watched(torch.zeros(8), 1e-12, 3)
    with pytest.raises(RunFailed, match="did not move"):
        watched(torch.ones(4096, dtype=torch.bfloat16), 1e-4, 3)


def test_a_weight_whose_updates_are_below_its_last_bit_is_not_blamed() -> None:
    assert watched(torch.ones(8), 1e-8, 9).resting == ["weight"]
    # Rounded at random, one element in some thousand moves.
    assert watched(torch.ones(64, dtype=torch.bfloat16), 1e-5, 9).resting == ["weight"]


@pytest.mark.parametrize(("gradient", "word"), [(0.0, "gradients of zero"), (None, "got no gradient")])
@pytest.mark.parametrize("of_base", [False, True])
def test_what_learns_nothing_beside_others_that_move_is_told(gradient: float | None, word: str, of_base: bool) -> None:
    def watch_of(idle: int) -> MoveWatch:
        model = torch.nn.Module()
        for number in range(5):
            name = "gate" if number < idle else "proj"
            layer = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"lora_B": torch.nn.Linear(2, 2, bias=False)})})
            model.add_module(f"layer{number}", layer)
        watch = MoveWatch(model, of_base=of_base)
        for _ in range(3):
            for name, parameter in model.named_parameters():
                if "proj" in name:
                    parameter.data += 1
                    parameter.grad = torch.ones_like(parameter)
                elif gradient is not None:
                    parameter.grad = torch.full_like(parameter, gradient)
            watch.after_update(model, last=False, learning_rate=1e-2)
        return watch

    told = watch_of(2).idle
    if of_base and gradient == 0:
        assert told is None  # it may move later
    else:
        assert word in (told or "")
        assert of_base or "target_modules: [proj]" in (told or "")
    if not of_base or gradient is None:
        with pytest.raises(RunFailed):
            watch_of(5)


def test_of_several_processes_each_must_use_every_parameter() -> None:
    """What one process leaves out, the others may have trained: a gradient missing in one is an error."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in ("used", "also", "unused")})
    watch = MoveWatch(model, alone=False)
    for name in ("used", "also"):
        model[name].weight.grad = torch.ones(2, 2)
    with pytest.raises(RunFailed, match="unused"):
        watch.after_update(model, last=False, learning_rate=1e-2)


def test_what_had_moved_before_an_interruption_is_not_watched_again() -> None:
    assert watched(torch.ones(8), 1e-5, 9, only=[]).resting == []


@pytest.mark.parametrize("name", ["galore", "longlora"])
def test_a_run_is_resumed_however_late(name: str, tmp_path: Path) -> None:
    # The last rates of a cosine are below the last bit of a norm.
    loaded = tiny.recipe(
        tmp_path,
        name,
        optimizer={"learning_rate": 1e-5},
        training={"max_steps": 120, "gradient_accumulation_steps": 1},
        data={"max_length": 128},
    )
    train_until(loaded, 117)
    assert train(loaded, resume=True)["status"] == "finished"
