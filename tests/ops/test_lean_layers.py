"""Layers that keep little compute as the plain ones do, and keep what they say."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.ops.eager import EAGER
from ftune.ops.kernels import using
from ftune.ops.linear import Adapted, cast_linear, low_rank_linears, low_rank_update, scale_directions
from ftune.ops.recompute import Activation, gated, rms_norm
from ftune.ops.rotary import rotate

N, D, R = 11, 8, 3


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape).requires_grad_() for shape in shapes]


def same(mine: Tensor, plain: Tensor, given: list[Tensor], tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(plain)
    pairs = zip(
        torch.autograd.grad((mine * weights).sum(), given), torch.autograd.grad((plain * weights).sum(), given),
        strict=True,
    )  # fmt: skip
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def kept_bytes(compute: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of what the backward pass keeps, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = compute()
    del out
    return sum(size for at, size in found.items() if at not in own)


@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm(offset: bool) -> None:
    x, weight = leaves((2, N, D), (D,))
    gain = 1 + weight if offset else weight
    plain = F.rms_norm(x, (D,), eps=1e-5) * gain
    same(rms_norm(x, weight, 1e-5, offset=offset), plain, [x, weight])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gated(activation: Activation) -> None:
    gate, up = leaves((N, D), (N, D))
    activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=activation[5:] or "none")
    same(gated(gate, up, activation), activated * up, [gate, up])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers has it."""
    low, high = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


@pytest.mark.parametrize("rows", [1, 2])
def test_rotate(rows: int) -> None:
    query, key = leaves((2, 4, N, D), (2, 1, N, D))
    cos, sin = torch.randn(rows, N, D), torch.randn(rows, N, D)
    query, key = query.double().detach().requires_grad_(), key.double().detach().requires_grad_()
    cos, sin = cos.double(), sin.double()
    mine = torch.cat([x.flatten() for x in rotate(query, key, cos, sin)])
    same(mine, torch.cat([turned(x, cos, sin).flatten() for x in (query, key)]), [query, key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("angle_dtype", [torch.float32, torch.bfloat16])
def test_rotate_rounds_where_the_usual_form_does(dtype: torch.dtype, angle_dtype: torch.dtype) -> None:
    query, key = (torch.randn(2, N, heads, D, dtype=dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    cos, sin = torch.randn(1, N, D, dtype=angle_dtype), torch.randn(1, N, D, dtype=angle_dtype)
    for mine, x in zip(rotate(query, key, cos, sin), (query, key), strict=True):
        expected = turned(x, cos, sin)
        assert torch.equal(mine, expected)
        assert mine.stride() == x.stride()
        grad = torch.randn_like(expected)
        (mine_x,), (x_grad,) = (torch.autograd.grad(out, x, grad, retain_graph=True) for out in (mine, expected))
        assert mine_x.dtype == dtype
        torch.testing.assert_close(mine_x, x_grad, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def low_rank_linear(x: Tensor, *layer: Any) -> Tensor:
    return low_rank_linears(x, [Adapted(*layer)])[0]


@pytest.mark.parametrize("used", [(0, 1, 2), (0, 2), (1,)])
@pytest.mark.parametrize("behind", ["nothing", "norm"])
def test_layers_of_one_input_and_outputs_that_nobody_uses(behind: str, used: tuple[int, ...]) -> None:
    x, gain = leaves((2, N, D), (D,))
    sizes, scales = ((D, R), (6, R + 1), (4, 2)), (2.0, 1.0, 0.5)
    trained = [leaves((rank, D), (out, rank)) for out, rank in sizes]
    frozen = [[p.detach() for p in leaves((out, D), (out,))] for out, _ in sizes]
    layers = [
        Adapted(weight, bias if scale == 1.0 else None, a, b, scale)
        for (weight, bias), (a, b), scale in zip(frozen, trained, scales, strict=True)
    ]
    given = x * 1 if behind == "nothing" else rms_norm(x, gain, 1e-5)
    plain = x if behind == "nothing" else F.rms_norm(x, (D,), gain, 1e-5)
    mine = low_rank_linears(given, layers)
    expected = [
        F.linear(plain, layer.weight, layer.bias_O) + layer.scale * plain @ layer.a_RI.T @ layer.b_OR.T
        for layer in layers
    ]
    wanted = [x, *(parameter for i in used for parameter in trained[i])] + ([gain] if behind == "norm" else [])
    same(*(torch.cat([outs[i].flatten() for i in used]) for outs in (mine, expected)), wanted)


@pytest.mark.parametrize("behind", ["nothing", "norm", "gate"])
def test_low_rank_behind_what_remembers(behind: str) -> None:
    x, y, gain, a, b = leaves((2, N, D), (2, N, D), (D,), (R, D), (D, R))
    weight, bias = (p.detach() for p in leaves((D, D), (D,)))
    mine = {"nothing": lambda: x * 1, "norm": lambda: rms_norm(x, gain, 1e-5), "gate": lambda: gated(x, y, "silu")}
    plain: dict[str, Callable[[], Any]] = {
        "nothing": lambda: x,
        "norm": lambda: F.rms_norm(x, (D,), gain, 1e-5),
        "gate": lambda: F.silu(x) * y,
    }
    given = [a, b, x] + {"nothing": [], "norm": [gain], "gate": [y]}[behind]

    def expected() -> Tensor:
        inner: Tensor = plain[behind]()
        return F.linear(inner, weight, bias) + 2.0 * (inner @ a.T) @ b.T

    same(low_rank_linear(mine[behind](), weight, bias, a, b, 2.0), expected(), given)
    made = mine[behind]()
    same(low_rank_update(made, F.linear(made, weight, bias), a, b, 2.0), expected(), given)


def test_cast_linear_in_one_dtype_is_a_linear_layer() -> None:
    x, gain, weight, bias = leaves((2, N, D), (D,), (D, D), (D,))
    normed = rms_norm(x, gain, 1e-5)
    plain = F.linear(F.rms_norm(x, (D,), gain, 1e-5), weight, bias)
    same(cast_linear(normed, weight, bias, torch.float32), plain, [x, gain, weight, bias])


def test_cast_linear_keeps_no_cast_weight() -> None:
    x, weight = leaves((N, D), (D, D))
    low = x.detach().bfloat16().requires_grad_()
    assert kept_bytes(lambda: cast_linear(low, weight, None, torch.bfloat16), [weight]) == N * D * 2
    grad = torch.autograd.grad(cast_linear(low, weight, None, torch.bfloat16).float().sum(), weight)[0]
    assert grad.dtype == torch.float32


def test_low_rank_keeps_the_input_and_xa_or_what_the_input_was_made_of() -> None:
    x, gain, a, b = leaves((N, D), (D,), (R, D), (D, R))
    weight = torch.randn(D, D)
    own = [gain, a, b, weight]
    assert kept_bytes(lambda: low_rank_linear(x * 1, weight, None, a, b, 1.0), own) == 4 * (N * D + N * R)
    # Behind a norm: the norm's input and one number a token, nothing else of width D.
    behind = kept_bytes(lambda: low_rank_linear(rms_norm(x, gain, 1e-5), weight, None, a, b, 1.0), own)
    assert behind == 4 * (N * D + N + N * R)


def test_nothing_is_computed_for_an_input_that_needs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, a, b = leaves((N, D), (R, D), (D, R))
    out = low_rank_linear(x.detach(), torch.randn(D, D), None, a, b, 1.0)
    wide = []
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda s, o: wide.append(tuple(o.shape)) or real(s, o))
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert (D, D) not in wide
    assert wide


def test_an_input_that_was_changed_in_place_is_kept_itself() -> None:
    x, gain, a, b = leaves((N, D), (D,), (R, D), (D, R))
    weight = torch.randn(D, D)
    changed = rms_norm(x, gain, 1e-5).mul_(3.0)
    inner = F.rms_norm(x, (D,), gain, 1e-5) * 3
    expected = inner @ weight.T + (inner @ a.T) @ b.T
    same(low_rank_linear(changed, weight, None, a, b, 1.0), expected, [x, gain, a, b], tolerance=1e-4)


def test_directions_are_scaled_in_place_of_an_update_beside_a_layer() -> None:
    x, base, a, b, magnitude = leaves((2, N, D), (2, N, D), (R, D), (D, R), (D,))
    norms = torch.full((D,), 3.0)
    mine = scale_directions(low_rank_update(x, base, a, b, 2.0), magnitude, norms)
    same(mine, (base + 2.0 * (x @ a.T) @ b.T) * (magnitude / norms), [x, base, a, b, magnitude])


@pytest.mark.parametrize("trained", [3, 1])
def test_what_several_layers_read_is_made_again_once_and_let_go(trained: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def again(*arguments: Any) -> Tensor:
        out = EAGER.norm_again(*arguments)
        made.append(weakref.ref(out))
        return out

    torch.manual_seed(0)
    x, gain = torch.randn(N, D, requires_grad=True), torch.ones(D)
    with using(replace(EAGER, norm_again=again)):
        normed = rms_norm(x, gain, 1e-5)
        outs = [
            low_rank_linear(
                normed,
                torch.randn(D, D),
                None,
                torch.randn(2, D, requires_grad=reader < trained),
                torch.randn(D, 2, requires_grad=True),
                1.0,
            )
            for reader in range(3)
        ]
        loss = sum(out.sum() for out in outs)
        loss.backward(retain_graph=True)  # type: ignore[union-attr]
        assert len(made) == 1
        assert made[0]() is None, "held though nobody will ask again"
        loss.backward()  # type: ignore[union-attr]  # whoever asks again gets it again
