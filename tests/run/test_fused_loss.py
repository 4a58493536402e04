"""Liger's loss is taken where it is the same and faster, and kept by the run that began with it.

There is a GPU to run Liger on for the last test only; the others put a stand-in with its signature in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from run.test_loop import train_until
from torch import nn
from torch.nn import functional as F

from ftune.artifacts import objective as artifacts_objective
from ftune.artifacts.evaluate import evaluate
from ftune.artifacts.training import train
from ftune.artifacts.tuned import find_target
from ftune.ops.cross_entropy import linear_cross_entropy
from ftune.run import fused_loss
from ftune.run.fused_loss import CHUNKED, LIGER, fused_cross_entropy, fused_pays
from ftune.run.head import AfterHead

N, D, V = 37, 12, 50


def stand_in(
    hidden: Any, weight: Any, targets: Any, *, bias: Any, reduction: str, softcap: Any, accum_dtype: Any
) -> tuple[Any, ...]:
    """What ``fused_linear_cross_entropy_forward`` gives: the loss, things nobody asked for, and three gradients."""
    assert (reduction, accum_dtype) == ("sum", torch.float32)
    if not hidden.requires_grad:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    with torch.enable_grad():
        logits = hidden @ weight.T
        logits = (logits if bias is None else logits + bias).float()
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        loss = F.cross_entropy(logits, targets, reduction=reduction)
        wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        grads = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted) if wanted else [], strict=True))
    return loss.detach(), None, None, None, *(grads.get(id(x)) for x in (hidden, weight, bias))


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Put a function in the place of Liger's."""

    def replace(forward: Callable[..., Any]) -> None:
        monkeypatch.setattr(fused_loss, "_forward", lambda: forward)

    return replace


# --- the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)])
def test_arguments_loss_and_gradients_are_those_of_our_own(
    put: Any, bias: bool, scale: float, softcap: float | None, dtype: torch.dtype, trained: bool
) -> None:
    put(stand_in)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_(trained)
    bias_V = torch.randn(V, generator=generator).requires_grad_(trained) if bias else None
    targets = torch.randint(V, (N,), generator=generator)
    wanted = [x for x in (hidden, weight, bias_V) if x is not None and x.requires_grad]
    given = (hidden, weight, targets, bias_V)
    mine, theirs = (loss(*given, scale=scale, softcap=softcap) for loss in (linear_cross_entropy, fused_cross_entropy))
    # In 16 bits our own rounds the sum of product and bias, and this one does not round a bias that trains.
    close = 1e-5 if dtype == torch.float32 else 0.05
    assert theirs.dtype == torch.float32
    assert float(theirs.detach()) == pytest.approx(float(mine.detach()), rel=close)
    for actual, expected in zip(
        torch.autograd.grad(theirs / 3, wanted), torch.autograd.grad(mine / 3, wanted), strict=True
    ):
        assert actual.dtype == expected.dtype
        assert float((actual - expected).norm()) <= close * float(expected.norm())
    with torch.no_grad():
        evaluated = float(fused_cross_entropy(*given, scale=scale, softcap=softcap))
    assert evaluated == pytest.approx(float(theirs.detach()), rel=1e-6 if bias_V is None else close)


def test_a_weight_that_trains_is_not_rounded_and_one_that_does_not_is_cast_once(put: Any) -> None:
    seen = []

    def forward(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((hidden.dtype, weight.dtype, weight.requires_grad))
        return stand_in(hidden, weight, *args, **kwargs)

    put(forward)
    hidden, targets = torch.randn(N, D, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.long)
    for trained in (True, False):
        fused_cross_entropy(hidden, torch.randn(V, D, requires_grad=trained), targets)
    assert seen == [(torch.bfloat16, torch.float32, True), (torch.bfloat16, torch.bfloat16, False)]


def test_no_targets_need_no_kernel(put: Any) -> None:
    put(lambda *_, **__: pytest.fail("called"))
    loss = fused_cross_entropy(
        torch.zeros(0, D, requires_grad=True), torch.ones(V, D), torch.zeros(0, dtype=torch.long)
    )
    assert float(loss.detach()) == 0


# --- the trial --------------------------------------------------------------------------------------------


class Machine:
    """A clock and a memory that only the losses move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.peak = 0

    def costing(self, loss: Callable[..., Any], seconds: float, bytes_: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.now += seconds
            self.peak = max(self.peak, bytes_)
            return loss(*args, **kwargs)

        return run


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A GPU's clock and memory; our own loss takes 10 ms and 1000 bytes on it."""
    found = Machine()
    monkeypatch.setattr(fused_loss, "time", SimpleNamespace(perf_counter=lambda: found.now))
    for name, answer in {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: setattr(found, "peak", 0),
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: found.peak,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(fused_loss, "linear_cross_entropy", found.costing(linear_cross_entropy, 0.010, 1000))
    return found


def head(bias: bool = False, trained: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 259, bias=bias).requires_grad_(trained)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """The stand-in with other gradients."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = stand_in(*args, **kwargs)
        return *found[:4], *(None if grad is None else change(grad) for grad in found[4:])

    return forward


def uncapped(*args: Any, softcap: Any, **kwargs: Any) -> Any:
    return stand_in(*args, softcap=None, **kwargs)


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("no kernel for this GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after_head", [AfterHead(259), AfterHead(259, 0.125, 20.0)])
@pytest.mark.parametrize(
    ("forward", "seconds", "bytes_", "taken"),
    [
        (stand_in, 0.005, 1000, True),
        (stand_in, 0.005, 1090, True),
        (stand_in, 0.005, 1200, False),
        (stand_in, 0.0099, 500, False),
        (stand_in, 0.020, 1000, False),
        (changed(lambda grad: grad * (1 + 2**-8)), 0.001, 10, False),
        (changed(lambda grad: grad.flip(0)), 0.001, 10, False),
        (broken, 0.0, 0, False),
    ],
)
def test_it_is_taken_where_it_is_the_same_and_faster(
    machine: Machine,
    put: Any,
    forward: Callable[..., Any],
    seconds: float,
    bytes_: int,
    taken: bool,
    after_head: AfterHead,
    dtype: torch.dtype,
) -> None:
    put(machine.costing(forward, seconds, bytes_))
    for bias, trained in ((True, False), (dtype == torch.float32, True)):
        given = head(bias, trained)
        state = torch.random.get_rng_state()
        assert fused_pays(given, after_head, dtype, 100) == taken
        assert all(parameter.grad is None for parameter in given.parameters())
        assert torch.equal(torch.random.get_rng_state(), state)


def test_a_cap_that_is_left_out_shows(machine: Machine, put: Any) -> None:
    put(machine.costing(uncapped, 0.001, 10))
    assert not fused_pays(head(), AfterHead(259, 1.0, 30.0), torch.bfloat16, 100)
    assert fused_pays(head(), AfterHead(259), torch.bfloat16, 100)


def test_what_would_be_rounded_otherwise_is_not_tried(machine: Machine, put: Any) -> None:
    put(machine.costing(stand_in, 0.001, 10))
    for given, after_head in ((head(), AfterHead(259, 5 / 6)), (head(bias=True, trained=True), AfterHead(259))):
        assert not fused_pays(given, after_head, torch.bfloat16, 100)
        assert fused_pays(given, after_head, torch.float32, 100)


@pytest.mark.parametrize("positions", [0, 1, 10**6])
def test_any_number_of_positions(machine: Machine, put: Any, positions: int) -> None:
    seen = []

    def forward(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden))
        return stand_in(hidden, *args, **kwargs)

    put(machine.costing(forward, 0.001, 10))
    assert fused_pays(head(), AfterHead(259), torch.float32, positions)
    assert set(seen) == {min(max(1, positions), fused_loss.POSITIONS)}


def test_a_slow_gpu_is_not_tried_for_long(machine: Machine, put: Any) -> None:
    put(machine.costing(stand_in, 5.0, 10))
    assert not fused_pays(head(), AfterHead(259), torch.float32, 8)
    assert machine.now < 11  # once to compare, once to time


# --- the verdict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "loss", "there", "pays", "others", "expected"),
    [
        ("cuda", None, True, True, True, True),
        ("cuda", None, True, True, False, False),
        ("cuda", None, True, False, True, False),
        ("cuda", None, False, None, True, False),
        ("cuda", LIGER, True, None, True, True),
        ("cuda", LIGER, False, None, True, False),
        ("cuda", CHUNKED, None, None, True, False),
        ("cpu", None, None, None, True, False),
        ("cpu", LIGER, None, None, True, False),
    ],
)
def test_all_processes_take_the_same_and_a_run_what_it_began_with(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    loss: str | None,
    there: bool | None,
    pays: bool | None,
    others: bool,
    expected: bool,
) -> None:
    def answer(value: bool | None) -> bool:
        assert value is not None, "must not be asked"
        return value

    monkeypatch.setattr(artifacts_objective, "liger_is_there", lambda: answer(there))
    objective: Any = SimpleNamespace(fused_pays=lambda positions, device: answer(pays))
    plan: Any = SimpleNamespace(
        context=SimpleNamespace(device=SimpleNamespace(type=device)),
        memory=SimpleNamespace(request=SimpleNamespace(target_tokens=100)),
    )
    accelerator: Any = SimpleNamespace(device="cpu", gather=lambda mine: torch.cat([mine, torch.tensor([int(others)])]))
    assert artifacts_objective._takes_fused(objective, plan, accelerator, loss) == expected


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="of a run on a CPU: with CUDA it runs there, and Liger is asked for"
)
def test_on_the_cpu_nothing_is_asked_or_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "_forward", lambda: pytest.fail("asked for"))
    assert train(tiny.recipe(tmp_path))["lean"]["loss"] == CHUNKED
    assert "liger_kernel" not in sys.modules


@pytest.mark.parametrize("still_there", [True, False])
def test_a_resumed_run_and_its_evaluation_compute_what_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, put: Any, capsys: Any, still_there: bool
) -> None:
    asked: list[str | None] = []

    def takes(*given: Any) -> bool:
        asked.append(given[-1])
        return still_there or len(asked) == 1

    computed: list[bool] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        computed.append(True)
        return stand_in(*args, **kwargs)

    put(forward)
    monkeypatch.setattr(artifacts_objective, "_takes_fused", takes)
    loaded = tiny.recipe(tmp_path, "full")
    train_until(loaded, 2)
    before = len(computed)
    assert before > 0
    record = train(loaded, resume=True)
    assert (len(computed) > before) == still_there
    evaluate(find_target(tmp_path / "run"), base=False)
    # An evaluation in float32 computes the loss as it reads the prompts, by neither.
    assert asked == [None, LIGER]
    assert record["lean"]["loss"] == (LIGER if still_there else CHUNKED)
    assert ("began with Liger's loss" in capsys.readouterr().err) == (not still_there)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("liger_kernel") is None, reason="needs CUDA and liger-kernel"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bias", "trained"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("after_head", [AfterHead(32000), AfterHead(32000, 0.125), AfterHead(32000, 1.0, 30.0)])
def test_ligers_kernel_agrees(dtype: torch.dtype, bias: bool, trained: bool, after_head: AfterHead) -> None:
    given = nn.Linear(512, 32000, bias=bias, device="cuda").requires_grad_(trained)
    example = fused_loss._example(given, after_head, dtype, 1024)
    mine, theirs = (
        fused_loss._gradients(loss, after_head, example) for loss in (linear_cross_entropy, fused_cross_entropy)
    )
    assert fused_loss._agree(mine, theirs, dtype)
