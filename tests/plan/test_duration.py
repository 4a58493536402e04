"""How long a run takes is said before it begins, evaluations included."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from ftune.plan import precision
from ftune.plan.devices import find_device
from ftune.plan.duration import EFFICIENCY, forward_flops, update_flops
from ftune.plan.machine import ON_PAPER, Machine
from ftune.plan.resolve import resolve
from ftune.plan.shapes import read_shape
from ftune.plan.summary import summary_of
from ftune.plan.table import render_plan


def test_operations_are_those_of_a_forward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, config = tiny.model(), tiny.config()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.ones(1, 256, dtype=torch.long), use_cache=False)
    found = forward_flops(read_shape(config), tokens=256, target_tokens=256, row_length=256)
    # Plain attention computes all scores, and masks one half of them.
    halves = 2 * 2 * 2 * 256 * 64 * 256 / 2
    assert found + halves == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_an_update_is_two_to_three_forward_passes_and_what_is_recomputed() -> None:
    shape = read_shape(tiny.config())
    forward = forward_flops(shape, 100, 50, 20)
    lora = update_flops(shape, tiny.method("lora"), 100, 50, 20, 0)
    full = update_flops(shape, tiny.method("full"), 100, 50, 20, 0)
    assert 2 * forward < lora < full == 3 * forward
    again = update_flops(shape, tiny.method("full"), 100, 50, 20, 1.0) - full
    assert again == forward_flops(shape, 100, 0, 20)


def test_the_plan_says_how_long_and_what_evaluations_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "matmul_speed", lambda dtype, device: 1e6)
    loaded = tiny.recipe(tmp_path, evaluation={"every_steps": 2}, training={"max_steps": 6})
    plan = resolve(loaded.recipe)
    found = summary_of(plan)["time"]
    assert found["evaluations"] == 4, "before the first update, after 2 and 4, and at the end"
    assert found["seconds"] == found["training"] + found["evaluation"]
    assert found["seconds"] == pytest.approx(found["flops"] / 1e6 / EFFICIENCY[plan.context.device.type])
    assert summary_of(resolve(tiny.recipe(tmp_path, data={"eval": None}).recipe))["time"]["evaluation"] == 0
    twice = summary_of(resolve(tiny.recipe(tmp_path, training={"max_steps": 12}).recipe))["time"]
    assert twice["training"] == pytest.approx(2 * found["training"])
    for width in (80, 120):
        text = " ".join(render_plan(summary_of(plan), width).split())
        assert "4 evaluations " in text
        assert "measured speed in matmuls: right to a factor of two" in text


def test_a_device_by_name_has_the_time_of_its_data_sheet_and_an_amount_of_memory_none(tmp_path: Path) -> None:
    recipe = tiny.recipe(tmp_path).recipe
    plan = resolve(recipe, machine=Machine.of(find_device("h100-80g")))
    found = summary_of(plan)["time"]
    speed = {torch.bfloat16: 989e12, torch.float32: 67e12}[plan.context.dtype]
    assert found["seconds"] == pytest.approx(found["flops"] / (speed * ON_PAPER * EFFICIENCY["cuda"]))
    two = summary_of(resolve(recipe, machine=Machine.of(find_device("h100-80g")), world_size=2))["time"]
    assert two["seconds"] / two["flops"] == pytest.approx(found["seconds"] / found["flops"] / 2)
    assert "from the data sheet of h100-80g" in " ".join(render_plan(summary_of(plan), 80).split())
    plan = resolve(recipe, machine=Machine.of(find_device("24GiB")))
    assert summary_of(plan)["time"] is None
    assert "\ntime" not in render_plan(summary_of(plan), 80)


def test_processes_on_one_machine_s_cpus_take_the_time_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "matmul_speed", lambda dtype, device: 1e6)
    found = summary_of(resolve(tiny.recipe(tmp_path).recipe, world_size=2))["time"]
    assert found["seconds"] == pytest.approx(found["flops"] / 1e6 / EFFICIENCY["cpu"])


def test_speed_is_measured_once_a_machine() -> None:
    device = torch.device("cpu")
    assert precision.matmul_speed("float32", device) == precision.matmul_speed("float32", device) > 1e8
