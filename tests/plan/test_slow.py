"""A recipe that names what this device is slow in is told so, by how much; one that leaves it open is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from ftune.artifacts import training
from ftune.artifacts.predict import predict
from ftune.artifacts.training import train
from ftune.artifacts.tuned import reading
from ftune.plan import precision
from ftune.plan.devices import find_device
from ftune.plan.machine import Machine
from ftune.plan.resolve import resolve
from ftune.plan.slow import slower_here, slower_on
from ftune.plan.summary import summary_of

CPU = torch.device("cpu")


def machine(speedup: float) -> Machine:
    """A CPU that multiplies bfloat16 so many times faster than float32."""
    flops = {"float32": 1e9, "bfloat16": 1e9 * speedup}
    return Machine(CPU, "a CPU", 2**40, bfloat16=speedup >= precision.MARGIN, flops=flops)


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.mark.parametrize(
    ("speedup", "dtype", "said"),
    [
        (
            1 / 23.2,
            "bfloat16",
            "bfloat16 is 23 times slower than float32 on this CPU (measured): write `model.dtype: auto`",
        ),
        (1 / 2.5, "bfloat16", "bfloat16 is 2.5 times slower than float32"),
        (12.0, "float32", "float32 is 12 times slower than bfloat16"),
        (1 / 1.9, "bfloat16", None),
        (1.9, "float32", None),
        (1 / 23, "float32", None),
        (12.0, "bfloat16", None),
        (1 / 23, "auto", None),
        (12.0, "auto", None),
    ],
)
def test_a_named_dtype_is_compared_with_the_measurement(
    tmp_path: Path, speedup: float, dtype: str, said: str | None
) -> None:
    found = slower_on(machine(speedup), tiny.recipe(tmp_path, model={"dtype": dtype}).recipe)
    assert [said in text for text in found] == [True] if said else found == ()


def test_what_dequantized_weights_are_multiplied_in_is_compared_too(tmp_path: Path) -> None:
    method = {"name": "qlora", "quantization": {"compute_dtype": "bfloat16"}}
    recipe = tiny.recipe(tmp_path, model={"dtype": "auto"}, method=method).recipe
    (found,) = slower_on(machine(0.05), recipe)
    assert found.endswith("write `method.quantization.compute_dtype: auto`")


def test_nothing_is_measured_for_a_recipe_that_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "matmul_speed", lambda *_: pytest.fail("measured"))
    assert slower_here(tiny.recipe(tmp_path, model={"dtype": "auto"}).recipe, CPU) == ()


@pytest.mark.parametrize(("device", "slow_there"), [("t4-16g", True), ("v100-32g", True), ("h100-80g", False)])
def test_of_a_device_that_is_not_here_it_is_known(tmp_path: Path, device: str, slow_there: bool) -> None:
    recipe = tiny.recipe(tmp_path, model={"dtype": "bfloat16"}).recipe
    assert bool(slower_on(Machine.of(find_device(device)), recipe)) is slow_there


def test_the_plan_says_it(tmp_path: Path) -> None:
    plan = resolve(tiny.recipe(tmp_path, model={"dtype": "bfloat16"}).recipe, machine=machine(0.05))
    assert any("20 times slower" in text for text in summary_of(plan)["warnings"])


def test_a_plan_for_a_machine_asks_nothing_of_the_one_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matmul_speed", "bf16_speedup"):
        monkeypatch.setattr(precision, name, lambda *_: pytest.fail("measured"))
    monkeypatch.setattr("ftune.plan.machine.available_bytes", lambda *_, **__: pytest.fail("asked for free memory"))
    recipe = tiny.recipe(tmp_path, model={"dtype": "auto"}).recipe
    chosen = {speedup: resolve(recipe, machine=machine(speedup)).recipe.model.dtype for speedup in (0.5, 2.0)}
    assert chosen == {0.5: "float32", 2.0: "bfloat16"}


def test_of_a_run_it_is_said_without_advice_that_cannot_be_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "matmul_speed", lambda dtype, device: {"float32": 20e9, "bfloat16": 1e9}[dtype])
    loaded = tiny.recipe(tmp_path, model={"dtype": "bfloat16"}, training={"max_steps": 2})
    with monkeypatch.context() as patched:
        patched.setattr(training, "write_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(loaded, progress=False)
    shown: list[list[str]] = []
    train(loaded, progress=False, resume=True, show_plan=lambda summary: shown.append(summary["warnings"]))
    with reading(tmp_path / "run") as of_run:
        pass
    (tmp_path / "recipe.yaml").write_text(loaded.text)
    with reading(tmp_path / "recipe.yaml") as of_recipe:
        pass
    for notes in (shown[0], of_run.notes, of_recipe.notes):
        (said,) = (note for note in notes if "20 times slower" in note)
        assert said.endswith("(measured): the run began in it and keeps it")
    answered = predict(of_run, str(tmp_path / "eval.jsonl"), tmp_path / "answers.jsonl")
    assert "20 times slower" in " ".join(answered["notes"])


@pytest.mark.slow
@pytest.mark.skipif("avx512_bf16" not in precision.processor(), reason="no bfloat16 to do without")
def test_without_its_instructions_bfloat16_is_measured_slow_and_not_chosen(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, model={"dtype": "bfloat16"})
    (tmp_path / "recipe.yaml").write_text(loaded.text)

    def plan(caps: dict[str, str], *overrides: str) -> str:
        command = [sys.executable, "-m", "ftune", "plan", str(tmp_path / "recipe.yaml"), *overrides]
        own = {name: value for name, value in os.environ.items() if name not in precision.CAPS}
        done = subprocess.run(command, env=own | caps, capture_output=True, text=True, timeout=120, check=True)
        return " ".join(done.stdout.split())

    told = re.compile(r"bfloat16 is ([\d.]+) times slower than float32 on this CPU \(measured\)")
    said = told.search(plan(AVX2))
    assert said
    assert float(said[1]) > 3, "7 to 60 times a product"
    assert ", float32," in plan(AVX2, "--set", "model.dtype=auto")
    without = told.search(plan({}))  # with the instructions, but without AMX, it can be half as fast
    assert without is None or float(without[1]) < float(said[1]) / 2, "what was measured with the caps is not taken"
