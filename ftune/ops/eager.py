"""The elementwise arithmetic of norms, SwiGLU and rotary positions as pure functions: one torch operation a line.

Another set of the same functions computes the same up to rounding (``ftune.ops.fused`` on CUDA); which is in force is
``ftune.ops.kernels``'s to say.

Shape suffixes: N tokens (any leading dimensions), D width, F width of the feed-forward; in ``rotate`` B rows, H heads,
L tokens of a row, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["EAGER", "Activation", "Kernels"]

Activation = Literal["silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Kernels:
    """The functions; those of ``EAGER`` say what each computes.

    Attributes:
        norm: ``(x_ND, weight_D, eps, offset)``: the normed input and ``rstd`` (N, 1) in fp32.
        norm_again: ``(x_ND, rstd, weight_D, offset)``: the normed input.
        norm_backward: ``(grad_ND, x_ND, rstd, weight_D, offset, wants_x, wants_weight)``: the gradients of input and
            gain, None where one is not wanted.
        gate: ``(gate_NF, up_NF, activation)``: ``activation(gate) * up``.
        gate_backward: ``(grad_NF, gate_NF, up_NF, activation, wants_gate, wants_up)``: the gradients of gate and up.
        rotate: ``(x_BHLD, cos_BLD, sin_BLD, back)``: heads turned by their positions; ``back``: the gradient of ``x``
            from that of the result. In the dtype that ``x`` and ``cos`` promote to.
    """

    norm: Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]
    norm_again: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    norm_backward: Callable[[Tensor, Tensor, Tensor, Tensor, bool, bool, bool], tuple[Tensor | None, Tensor | None]]
    gate: Callable[[Tensor, Tensor, Activation], Tensor]
    gate_backward: Callable[[Tensor, Tensor, Tensor, Activation, bool, bool], tuple[Tensor | None, Tensor | None]]
    rotate: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def _norm(x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    rstd_N = torch.rsqrt(x_ND.float().square().mean(-1, keepdim=True) + eps)
    return _norm_again(x_ND, rstd_N, weight_D, offset), rstd_N


def _norm_again(x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, offset: bool) -> Tensor:
    if offset:
        return ((x_ND.float() * rstd_N) * (1.0 + weight_D.float())).to(x_ND.dtype)
    return weight_D * (x_ND.float() * rstd_N).to(x_ND.dtype)


def _norm_backward(
    grad_ND: Tensor, x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, offset: bool, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    normed_ND = x_ND.float() * rstd_N
    grad_ND = grad_ND.float()
    grad_x = grad_weight = None
    if wants_weight:
        grad_weight = (grad_ND * normed_ND).flatten(0, -2).sum(0).to(weight_D.dtype)
    if wants_x:
        gain = weight_D.float() + 1.0 if offset else weight_D.float()
        inner_ND = grad_ND * gain
        mean_N = (inner_ND * normed_ND).mean(-1, keepdim=True)
        grad_x = inner_ND.sub_(normed_ND.mul_(mean_N)).mul_(rstd_N).to(x_ND.dtype)
    return grad_x, grad_weight


def _activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _slope(grad: Tensor, x: Tensor, activation: Activation) -> Tensor:
    """The gradient of the activation's input."""
    found: Tensor
    if activation == "silu":
        found = torch.ops.aten.silu_backward(grad, x)
    else:
        found = torch.ops.aten.gelu_backward(grad, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    return found


def _gate(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    return _activated(gate_NF, activation).mul_(up_NF)


def _gate_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: Activation, wants_gate: bool, wants_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_up = _activated(gate_NF, activation).mul_(grad_NF) if wants_up else None
    grad_gate = _slope(grad_NF * up_NF, gate_NF, activation) if wants_gate else None
    return grad_gate, grad_up


def _rotate(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, back: bool) -> Tensor:
    cos, half = cos_BLD[:, None], x_BHLD.shape[-1] // 2
    low_sin, high_sin = sin_BLD[:, None, :, :half], sin_BLD[:, None, :, half:]
    low, high = x_BHLD[..., :half], x_BHLD[..., half:]
    out = x_BHLD * cos
    # Rounded as often as where halves are exchanged, a sign turned and two products added: to the same bits.
    if back:
        out[..., :half] += high * high_sin
        out[..., half:] -= low * low_sin
    else:
        out[..., :half] -= high * low_sin
        out[..., half:] += low * high_sin
    return out


EAGER = Kernels(_norm, _norm_again, _norm_backward, _gate, _gate_backward, _rotate)
