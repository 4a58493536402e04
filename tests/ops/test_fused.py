"""The fused kernels against the eager ones: on CUDA, or anywhere under ``TRITON_INTERPRET=1`` where triton is there."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.ops.cross_entropy import linear_cross_entropy
from ftune.ops.eager import EAGER
from ftune.ops.kernels import has_fused

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs CUDA, or triton and TRITON_INTERPRET=1",
)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Any:
    from ftune.ops import fused

    if not CUDA:
        monkeypatch.setattr(fused, "_on", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(fused, "_processors", lambda _: 2)
        monkeypatch.setattr(fused, "_there", lambda _: True)
    return fused


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_close(mine: Any, eager: Any) -> None:
    """To fp32's rounding; in bf16 to one of its own, two for the interpreter, which cuts off instead of rounding."""
    pairs = zip(mine, eager, strict=True) if isinstance(mine, tuple) else [(mine, eager)]
    for one, other in pairs:
        if other is None:
            assert one is None
            continue
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        bound = 1e-6 if one.dtype == torch.float32 else 2**-8 if CUDA else 2**-6
        assert (one.float() - other.float()).norm() <= bound * other.float().norm()


def test_they_are_used_where_there_is_a_gpu() -> None:
    assert has_fused() == CUDA


@pytest.mark.parametrize("state", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_whoever_asks_first_is_told_the_same(fused: Any, state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not CUDA:  # the interpreter cuts off instead of rounding
        monkeypatch.setattr(fused, "_close", lambda *_: True)
    with state(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert fused.works(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gain_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 96), (300, 1000), (7, 4096)])
def test_norms(fused: Any, dtype: torch.dtype, gain_dtype: torch.dtype, offset: bool, shape: tuple[int, ...]) -> None:
    x, gain = random(*shape, dtype=dtype), random(shape[-1], dtype=gain_dtype, seed=1) * 0.1 + 1
    out, rstd = EAGER.norm(x, gain, 1e-6, offset)
    mine, again = fused.FUSED.norm(x, gain, 1e-6, offset), fused.FUSED.norm_again(x, rstd, gain, offset)
    assert_close(mine[1], rstd)
    # An fp32 gain of a norm in bf16 gives fp32, of what was rounded to bf16.
    lowered = [part.to(dtype) for part in (mine[0], again, out)]
    assert_close(lowered[0], lowered[2])
    assert_close(lowered[1], lowered[2])
    assert mine[0].dtype == again.dtype == out.dtype
    grad = random(*shape, dtype=out.dtype, seed=2)
    for wants in ((True, True), (True, False), (False, True)):
        arguments = (grad, x, rstd, gain, offset, *wants)
        assert_close(fused.FUSED.norm_backward(*arguments), EAGER.norm_backward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(fused: Any, dtype: torch.dtype, activation: Any) -> None:
    gate, up, grad = (random(3, 700, dtype=dtype, seed=seed) * 3 for seed in range(3))
    assert_close(fused.FUSED.gate(gate, up, activation), EAGER.gate(gate, up, activation))
    for wants in ((True, True), (True, False), (False, True)):
        arguments = (grad, gate, up, activation, *wants)
        assert_close(fused.FUSED.gate_backward(*arguments), EAGER.gate_backward(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "heads", "width"), [(1, 3, 64), (2, 40, 128), (2, 1, 6)])
def test_rotary_positions(
    fused: Any, dtype: torch.dtype, angle_dtype: torch.dtype, rows: int, heads: int, width: int
) -> None:
    x = random(2, 7, heads, width, dtype=dtype)
    cos, sin = (random(rows, 7, width, dtype=angle_dtype, seed=seed) for seed in (1, 2))
    for heads_first in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
        for back in (False, True):
            mine = fused.FUSED.rotate(heads_first, cos, sin, back)
            assert_close(mine, EAGER.rotate(heads_first, cos, sin, back))
            assert mine.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
def test_softmax_minus_target(fused: Any, dtype: torch.dtype, scale: float, cap: float | None) -> None:
    logits, targets = random(6, 20_000, dtype=dtype) * 4, torch.tensor([0, 19_999, 5, 8191, 8192, 77], device=DEVICE)
    logits[0, 0] = 30.0  # nearly certain
    given = logits.float().requires_grad_()
    scaled = given * scale if cap is None else cap * torch.tanh(given * scale / cap)
    loss = F.cross_entropy(scaled, targets, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), given)
    before = logits.clone()
    assert_close(fused.softmax_minus_target(logits, targets, scale, cap, wants_grad=False), loss.detach())
    assert torch.equal(logits, before)
    assert_close(fused.softmax_minus_target(logits, targets, scale, cap, wants_grad=True), loss.detach())
    assert_close(logits, grad.to(dtype))


def test_logits_of_minus_infinity_and_what_does_not_lie_in_one_piece(fused: Any) -> None:
    logits, targets = random(2, 20_000), torch.tensor([[19_000, 0], [9_000, 0]], device=DEVICE)[:, 0]
    logits[:, :8192] = -torch.inf
    expected = F.cross_entropy(logits, targets, reduction="none")
    assert_close(fused.softmax_minus_target(logits, targets, 1.0, None, wants_grad=False), expected)
    x, gain = random(3, 128)[:, ::2], random(128, seed=1)[::2]
    assert_close(fused.FUSED.norm(x, gain, 1e-6, False), EAGER.norm(x, gain, 1e-6, False))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [False, True])
def test_the_loss_and_its_gradients_are_those_without(
    dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight = random(100, 64, dtype=dtype).requires_grad_(), random(5000, 64, seed=1).requires_grad_(trained)
    targets = torch.arange(100, device=DEVICE) * 49
    wanted = [hidden, weight] if trained else [hidden]

    def gradients() -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, targets, scale=0.5, softcap=20.0, chunk=32)
        return [loss.detach(), *torch.autograd.grad(loss / 3, wanted)]

    mine = gradients()
    monkeypatch.setattr("ftune.ops.cross_entropy.has_fused", lambda: False)
    assert_close(tuple(mine), tuple(gradients()))


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("shared", [1, 4])
def test_attention_over_documents_is_that_of_their_mask(shared: int) -> None:
    from ftune.methods import documents

    borders = torch.tensor([0, 100, 101, 356, 512], dtype=torch.int32, device="cuda")
    query, grad = random(1, 8, 512, 64, dtype=torch.bfloat16), random(1, 512, 8, 64, dtype=torch.bfloat16, seed=3)
    key, value = (random(1, 8 // shared, 512, 64, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    given = [x.requires_grad_() for x in (query, key, value)]
    out = documents._varlen(*given, borders, None)
    mine = [out, *torch.autograd.grad(out, given, grad)]
    wide = [x.float() for x in given]
    masked = F.scaled_dot_product_attention(*wide, documents._mask_of(borders), enable_gqa=shared > 1).transpose(1, 2)
    theirs = [masked, *torch.autograd.grad(masked, given, grad.float())]
    for one, other in zip(mine, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * other.float().norm()
