"""Tensors that remember what they were cheaply made of, so that the layers that read them need not keep them.

A linear layer that trains, or that carries an adapter, keeps its input for the backward pass. Where that input is the
output of a norm or of a gate, the norm or gate keeps its own input already: the product is one elementwise pass away.
So ``rms_norm`` and ``gated`` leave with their output how to make it again, and the layers in ``ftune.ops.linear`` keep
that instead. Source: Chen et al., Training Deep Nets with Sublinear Memory Cost (arXiv:1604.06174), applied inside
a block to what is cheap.

Shape suffixes: N tokens, D width, F width of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Activation", "Kept", "gated", "keep", "kept_again", "rms_norm"]

Activation = Literal["silu", "gelu", "gelu_tanh"]

Make = Callable[..., Tensor]
Kept = tuple[Make | None, tuple[Tensor, ...]]
"""How to make a tensor again and out of what; the tensor itself where ``Make`` is None."""


def keep(x: Tensor) -> Kept:
    """What to save of ``x``: its makings where it remembers them, else itself."""
    made = getattr(x, "_ftune_made_of", None)
    if made is None:
        return None, (x,)
    make, parts, versions = made
    # A tensor that was changed in place is no longer what its makings make.
    return (make, parts) if versions == _versions(x, *parts) else (None, (x,))


def kept_again(make: Make | None, parts: tuple[Tensor, ...]) -> Tensor:
    """The tensor that was kept."""
    return parts[0] if make is None else make(*parts)


def _remember(x: Tensor, make: Make, *parts: Tensor) -> Tensor:
    kept = tuple(part.detach() for part in parts)
    x._ftune_made_of = (make, kept, _versions(x, *kept))  # type: ignore[attr-defined]
    return x


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


# --- RMS norm ----------------------------------------------------------------------------------------------


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float, *, offset: bool = False) -> Tensor:
    """Root-mean-square norm, computed in fp32; keeps its input in its own dtype and one number a token.

    Args:
        x_ND: Any leading dimensions.
        weight_D: The gain.
        eps: Added to the mean square.
        offset: Gemma's form: the gain is ``1 + weight``, multiplied in fp32. Else Llama's: the normalized input is
            rounded to its dtype first.

    Returns:
        As transformers' RMS norms do: in the input's dtype (Llama's form: promoted with the gain's).
    """
    out: Tensor
    out, rstd_N = _RmsNorm.apply(x_ND, weight_D, eps, offset)  # type: ignore[no-untyped-call]
    return _remember(out, _offset_norm if offset else _plain_norm, x_ND, rstd_N, weight_D)


def _plain_norm(x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor) -> Tensor:
    return weight_D * (x_ND.float() * rstd_N).to(x_ND.dtype)


def _offset_norm(x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor) -> Tensor:
    return ((x_ND.float() * rstd_N) * (1.0 + weight_D.float())).to(x_ND.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
        rstd_N = torch.rsqrt(x_ND.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_ND, rstd_N, weight_D)
        ctx.offset = offset
        ctx.mark_non_differentiable(rstd_N)
        return (_offset_norm if offset else _plain_norm)(x_ND, rstd_N, weight_D), rstd_N

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, _: Any) -> tuple[Any, ...]:
        x_ND, rstd_N, weight_D = ctx.saved_tensors
        normed_ND = x_ND.float() * rstd_N
        grad_ND = grad_ND.float()
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad_ND * normed_ND).flatten(0, -2).sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            gain = weight_D.float() + 1.0 if ctx.offset else weight_D.float()
            inner_ND = grad_ND * gain
            mean_N = (inner_ND * normed_ND).mean(-1, keepdim=True)
            grad_x = inner_ND.sub_(normed_ND.mul_(mean_N)).mul_(rstd_N).to(x_ND.dtype)
        return grad_x, grad_weight, None, None


# --- gate --------------------------------------------------------------------------------------------------


def gated(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up``; keeps gate and up, not the activated gate.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).
    """
    out: Tensor = _Gated.apply(gate_NF, up_NF, activation)  # type: ignore[no-untyped-call]
    return _remember(out, _PRODUCTS[activation], gate_NF, up_NF)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
_SLOPES: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
}
_PRODUCTS: dict[Activation, Make] = {
    "silu": lambda gate, up: F.silu(gate).mul_(up),
    "gelu": lambda gate, up: F.gelu(gate).mul_(up),
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh").mul_(up),
}


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation = activation
        return _PRODUCTS[activation](gate_NF, up_NF)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Any, ...]:
        gate_NF, up_NF = ctx.saved_tensors
        grad_gate = grad_up = None
        if ctx.needs_input_grad[1]:
            grad_up = _ACTIVATIONS[ctx.activation](gate_NF).mul_(grad_NF)
        if ctx.needs_input_grad[0]:
            grad_gate = _SLOPES[ctx.activation](grad_NF * up_NF, gate_NF)
        return grad_gate, grad_up, None
