"""Compiling is tried where it is expected to pay, kept where it does, and never a failure; the clock is the test's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from run.test_loop import assert_equal, losses, train_until, weights
from torch import Tensor

from ftune.artifacts.training import train
from ftune.errors import RunFailed
from ftune.methods import METHODS
from ftune.ops.compiled import COMPILED
from ftune.ops.kernels import EAGER, Kernels, current, plain
from ftune.plan.lean import make_lean
from ftune.run import compiling
from ftune.run.compiling import choose_kernels
from ftune.run.kernel_work import Work, find_work, portions
from ftune.run.loop import Loop

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


class Machine:
    """Kernels that take a given time by the test's clock, and a compiler of them."""

    def __init__(
        self, clock: list[float], monkeypatch: pytest.MonkeyPatch, *, compiled: float = 0.25, cost: float = 30.0
    ) -> None:
        self.clock, self.cost, self.tried = clock, cost, 0
        self.out: Tensor | None = torch.ones(4)
        self.eager = self.kernels(1.0, torch.ones(4))
        self.compiled = self.kernels(compiled, None)
        self.error: Exception | None = None
        monkeypatch.setattr(compiling, "EAGER", self.eager)
        monkeypatch.setattr(compiling, "plain", lambda: self.eager)
        monkeypatch.setattr(compiling, "compile_kernels", self.compile)

    def kernels(self, seconds: float, out: Tensor | None) -> Kernels:
        def gate(*_: Any) -> Tensor:
            self.clock[0] += seconds
            found = self.out if out is None else out
            assert found is not None
            return found

        return replace(EAGER, gate=gate)

    def compile(self, calls: Any) -> Kernels:
        self.tried += 1
        assert [name for name, _ in calls] == ["gate"]
        self.clock[0] += self.cost
        if self.error is not None:
            raise self.error
        return self.compiled

    def choose(
        self,
        asked: Any,
        micro_batches: int,
        *,
        began: bool | None = None,
        agree: Callable[[bool], bool] = lambda verdict: verdict,
    ) -> tuple[bool, dict[str, Any]]:
        """Whether the compiled kernels were taken, and what was said of it; the work is two gates."""
        work = [Work("gate", (torch.ones(2, 2), torch.ones(2, 2), "silu"), 2)]
        kernels, found = choose_kernels(asked, lambda: work, micro_batches, CPU, agree, began)
        assert kernels is (self.compiled if found["compiled"] else self.eager)
        json.dumps(found)
        return found["compiled"], found


@pytest.fixture
def machine(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(clock, monkeypatch)


def test_a_short_run_does_not_try(machine: Machine) -> None:
    # 2 s eager in each of 89, of which a third is hoped for, against 60 s
    compiled, found = machine.choose("auto", 89)
    assert (compiled, machine.tried) == (False, 0)
    assert found["why"] == "eager: compiling takes about 60 s and would save about 59.3 s of this run"


def test_a_long_run_tries_and_keeps_what_is_faster(machine: Machine) -> None:
    compiled, found = machine.choose("auto", 100)
    assert (compiled, machine.tried) == (True, 1)
    assert found["eager_seconds"] == pytest.approx(2.0)
    assert found["compiled_seconds"] == pytest.approx(0.5)
    assert found["gain_seconds"] == pytest.approx(150)
    # 30 s, and the calls that were compared
    assert found["cost_seconds"] == pytest.approx(31.25)


def test_what_is_slower_is_dropped_and_not_tried_again(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(clock, monkeypatch, compiled=1.5)
    compiled, found = machine.choose("auto", 1000)
    assert (compiled, machine.tried) == (False, 1)
    assert found["gain_seconds"] == pytest.approx(-1000)
    assert machine.choose("auto", 10**6)[0] is False
    assert machine.tried == 1


def test_the_cost_and_the_gain_are_remembered(machine: Machine) -> None:
    assert machine.choose("auto", 100)[0]
    # 1.5 s a micro-batch against the 31.25 s that it cost
    assert not machine.choose("auto", 20)[0]
    assert machine.tried == 1
    assert machine.choose("auto", 21)[0]
    assert machine.tried == 2


def test_the_most_that_it_cost_is_what_it_is_expected_to_cost(machine: Machine) -> None:
    machine.choose("auto", 100)
    machine.cost = 0.0
    machine.choose("auto", 100)
    assert machine.choose("auto", 100)[1]["expected_cost_seconds"] == pytest.approx(31.25)


def test_no_cache_means_the_default_every_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTUNE_CACHE_GIB", "0")
    machine.choose("auto", 100)
    assert machine.choose("auto", 100)[1]["expected_cost_seconds"] == 60


def test_true_is_whatever_it_costs(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine(clock, monkeypatch, compiled=1.5).choose(True, 1)[0]


@pytest.mark.parametrize("out", [torch.full((4,), 1.001), torch.full((4,), float("nan")), torch.ones(5)])
@pytest.mark.parametrize("asked", ["auto", True])
def test_wrong_numbers_are_not_used(machine: Machine, asked: Any, out: Tensor) -> None:
    machine.out = out
    compiled, found = machine.choose(asked, 1000)
    assert (compiled, machine.tried) == (False, 1)
    assert found["why"] == "eager: compiled, gate compute something else"


@pytest.mark.parametrize("asked", ["auto", True])
def test_a_compiler_that_fails_is_no_failure(machine: Machine, asked: Any) -> None:
    machine.error = RuntimeError("No working\n C++ compiler found")
    compiled, found = machine.choose(asked, 1000)
    assert not compiled
    assert found["why"] == "eager: the compiler failed (RuntimeError: No working C++ compiler found)"
    assert found["cost_seconds"] == 30


def test_kernels_that_cannot_run_and_a_model_that_cannot_be_seen_are_no_failure(machine: Machine) -> None:
    machine.out = None  # an AssertionError
    assert not machine.choose(True, 1000)[0]
    fails: Any = lambda: 1 / 0  # noqa: E731
    _, found = choose_kernels(True, fails, 10, CPU, bool)
    assert found["why"].startswith("eager: the norms and gates could not be timed (ZeroDivisionError")
    _, found = choose_kernels(True, list, 10, CPU, bool)
    assert "nothing to compile" in found["why"]


@pytest.mark.parametrize("asked", ["auto", True])
def test_the_verdict_of_the_beginning_holds(machine: Machine, asked: Any) -> None:
    assert machine.choose(asked, 1, began=True)[0]
    assert machine.tried == 1
    assert machine.choose(asked, 10**6, began=False) == (
        False,
        {"asked": asked, "compiled": False, "why": "eager, as the run began", "micro_batches": 10**6},
    )
    assert machine.tried == 1


@pytest.mark.parametrize(("refused", "tried"), [(0, 0), (1, 1), (2, 1)])
def test_one_process_that_says_no_speaks_for_all(machine: Machine, refused: int, tried: int) -> None:
    mine: list[bool] = []

    def agree(verdict: bool) -> bool:
        mine.append(verdict)
        return verdict and len(mine) <= refused

    compiled, found = machine.choose("auto", 100, agree=agree)
    assert (compiled, machine.tried, mine) == (False, tried, [True] * (refused + 1))
    assert "eager: another process" in found["why"]


# --- what a micro-batch calls ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_calls_of_every_method_are_seen(name: str) -> None:
    method, context = tiny.method(name), tiny.context(row_lengths=[40], max_length=128, tokenizer=tiny.tokenizer())
    model = method.adapt(tiny.model().train().requires_grad_(name == "full"), context)
    lean = make_lean(model, method, context, "sdpa")
    work = {each.kernel: each for each in find_work(model, lean, 50, torch.float32, CPU)}
    assert (work["norm"].times, work["norm_backward"].times) == (5, 5)
    assert work["gate"].times == 2 + lean.get("low_rank", 0) / 7
    assert (work["norm"].arguments[0].shape, work["gate"].arguments[0].shape) == ((50, 64), (50, 128))
    if "low_rank" in lean:
        assert work["norm_again"].times == pytest.approx(lean["low_rank"] * 5 / 7)
    assert model.training


@pytest.mark.parametrize("transposed", [True, False])
def test_norms_of_heads_have_a_row_for_each_and_are_not_made_again(transposed: bool) -> None:
    """Qwen3 norms (batch, tokens, heads, width), Gemma 3 (batch, heads, tokens, width)."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, Qwen3Config

    config: Any = (Gemma3TextConfig if transposed else Qwen3Config)(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0,
    )  # fmt: skip
    method, context = tiny.method("lora"), tiny.context(dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = method.adapt(base.requires_grad_(False).train(), context)
    lean = make_lean(model, method, context, "sdpa")
    work = find_work(model, lean, 50, torch.bfloat16, CPU)
    times = {(each.kernel, *each.arguments[0].shape): each.times for each in work}
    stream = 9 if transposed else 5
    assert times == {
        ("norm", 50, 64): stream, ("norm_again", 50, 64): pytest.approx(10), ("norm_backward", 50, 64): stream,
        ("norm", 200, 16): 2, ("norm_backward", 200, 16): 2, ("norm", 100, 16): 2, ("norm_backward", 100, 16): 2,
        ("gate", 50, 96): 4, ("gate_backward", 50, 96): 2,
    }  # fmt: skip
    assert {each.arguments[-1] for each in work if each.kernel == "norm"} == {transposed}


@pytest.mark.parametrize(
    ("flat", "start", "expected"),
    # 8 rows of 250 tokens an update, on two processes; a flat micro-batch holds 600 of them
    [(False, 0, (250, 40)), (True, 0, (500, 20)), (True, 4, (500, 12))],
)
def test_portions(flat: bool, start: int, expected: tuple[int, int]) -> None:
    training = SimpleNamespace(accumulation=4)
    plan: Any = SimpleNamespace(
        row_lengths=[200, 300] * 20, steps_per_epoch=5, world_size=2, total_steps=10, micro_batch_tokens=600,
        recipe=SimpleNamespace(training=training),
    )  # fmt: skip
    assert portions(plan, flat, start) == expected


# --- in a run ----------------------------------------------------------------------------------------------


class Compiler:
    """A stand-in that counts how often it is asked and how often what it made is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried = self.called = 0
        monkeypatch.setattr(compiling, "compile_kernels", self.compile)

    def compile(self, calls: Any) -> Kernels:
        self.tried += 1

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                self.called += 1
                return function(*arguments)

            return call

        return Kernels(*(counted(getattr(EAGER, name)) for name in Kernels.__dataclass_fields__))


def kept(run: Path, step: int) -> Any:
    return json.loads((run / f"checkpoints/step-{step}/progress.json").read_text()).get("compile")


def test_a_run_uses_them_and_leaves_the_eager_ones_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = Compiler(monkeypatch)
    record = train(tiny.recipe(tmp_path, training={"compile": True}))
    in_the_trial = compiler.called
    assert record["lean"]["compile"]["compiled"] is True
    assert "compile: norms and gates compiled in" in capsys.readouterr().err
    assert current() is plain()
    assert kept(tmp_path / "run", 4) is True

    def fails(*_: Any, **__: Any) -> None:
        assert current() is not plain()
        raise RunFailed("no")

    monkeypatch.setattr(Loop, "run", fails)
    with pytest.raises(RunFailed):
        train(tiny.recipe(tmp_path, training={"compile": True}), overwrite=True)
    assert compiler.called < 2 * in_the_trial, "the loop called them"
    assert current() is plain()


def test_not_asked_for_is_not_mentioned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = train(tiny.recipe(tmp_path))
    assert "compile" not in record["lean"]
    assert kept(tmp_path / "run", 4) is None
    assert "compile" not in capsys.readouterr().err


def test_auto_leaves_a_short_run_alone_also_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = Compiler(monkeypatch)
    loaded = tiny.recipe(tmp_path, training={"compile": "auto"})
    train_until(loaded, 2)
    assert "compile: eager: compiling takes about 60 s" in capsys.readouterr().err
    assert kept(tmp_path / "run", 2) is False
    record = train(loaded, resume=True)
    assert compiler.tried == 0
    assert record["lean"]["compile"]["why"] == "eager, as the run began"


@pytest.mark.parametrize("still_there", [True, False])
def test_a_run_that_goes_on_uses_what_it_began_with(
    still_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = Compiler(monkeypatch)
    loaded = tiny.recipe(tmp_path, training={"compile": True})
    train_until(loaded, 2)

    def gone(calls: Any) -> Kernels:
        raise RuntimeError("no compiler")

    if not still_there:
        monkeypatch.setattr(compiling, "compile_kernels", gone)
    capsys.readouterr()
    record = train(loaded, resume=True)
    assert record["lean"]["compile"]["compiled"] is still_there
    assert kept(tmp_path / "run", 4) is still_there
    assert ("warning: this run began with compiled kernels" in capsys.readouterr().err) is not still_there
    assert compiler.tried == 1 + still_there


# --- the real compiler -------------------------------------------------------------------------------------


def has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_run_has_the_losses_of_an_eager_one(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_compiler():
        pytest.skip("no C++ compiler")
    from ftune.ops import compiled

    runs: dict[str, int] = {}
    real = compiled._Compiled._run

    def counting(self: Any, arguments: tuple[Any, ...], stance: str) -> Any:
        if stance != "default":
            # the stricter stance: an error where eager would step in
            stance = "fail_on_recompile"
            runs[self.name] = runs.get(self.name, 0) + 1
        return real(self, arguments, stance)

    monkeypatch.setattr(compiled._Compiled, "_run", counting)
    settings = {"max_steps": 5, "gradient_checkpointing": checkpointing}
    train(tiny.recipe(tmp_path, training=settings, output_dir=str(tmp_path / "eager")))
    asked = {"training": settings | {"compile": True}}
    whole = tiny.recipe(tmp_path, output_dir=str(tmp_path / "whole"), **asked)
    record = train(whole)
    assert record["lean"]["compile"]["compiled"], record["lean"]["compile"]["why"]
    assert runs.keys() == set(COMPILED)
    # 5 norms in at least 5 micro-batches, beside those of the trial: one compared, the others timed
    assert runs["norm_backward"] >= 25 + 1 + (compiling.ROUNDS + 1) * compiling.CALLS
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)

    parts = tiny.recipe(tmp_path, output_dir=str(tmp_path / "parts"), **asked)
    train_until(parts, 2)
    train(parts, resume=True)
    assert_equal(weights(tmp_path / "whole", 5), weights(tmp_path / "parts", 5))


OTHER_WIDTH = """
import torch
from ftune.ops.compiled import compile_kernels
from ftune.ops.kernels import EAGER
x = torch.arange(64.0 * 40).reshape(64, 40)
made = compile_kernels([("norm", (x[:2], torch.ones(40), 1e-6, False))])
for a, b in zip(made.norm(x, torch.ones(40), 1e-6, False), EAGER.norm(x, torch.ones(40), 1e-6, False)):
    torch.testing.assert_close(a, b)
"""


@pytest.mark.slow
def test_what_was_generated_for_another_processor_is_not_compiled_for_this_one(tmp_path: Path) -> None:
    if not has_compiler():
        pytest.skip("no C++ compiler")
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("one width alone on this processor: torch runs what it is told to, and dies of what is not there")
    for capability in ("avx2", "avx512"):
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        subprocess.run([sys.executable, "-c", OTHER_WIDTH], env=environment, check=True)
