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
from typing import Any

import torch
from torch import Tensor

from ftune.ops.eager import Activation, Kernels
from ftune.ops.kernels import current

__all__ = ["Activation", "Kept", "gated", "keep", "kept_again", "rms_norm"]


class Make:
    """Makes a tensor again out of what it was made of: once for all that read it, and gone with the last of them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._readers = 0
        self._made: Tensor | None = None

    def will_be_asked(self) -> None:
        """Count one more that will ask, in its backward pass."""
        self._readers += 1

    def __call__(self, *parts: Tensor) -> Tensor:
        """The tensor."""
        made = self._function(*parts) if self._made is None else self._made
        self._readers -= 1
        # Those that read a norm, such as q, k and v, ask for it one after another.
        self._made = made if self._readers > 0 else None
        return made


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
    kernels = current()
    out: Tensor
    out, rstd_N = _RmsNorm.apply(x_ND, weight_D, eps, offset, kernels)  # type: ignore[no-untyped-call]
    return _remember(out, _norm_of(kernels, offset), x_ND, rstd_N, weight_D)


def _norm_of(kernels: Kernels, offset: bool) -> Make:
    return Make(lambda x_ND, rstd_N, weight_D: kernels.norm_again(x_ND, rstd_N, weight_D, offset))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        out_ND, rstd_N = kernels.norm(x_ND, weight_D, eps, offset)
        ctx.save_for_backward(x_ND, rstd_N, weight_D)
        ctx.offset, ctx.kernels = offset, kernels
        ctx.mark_non_differentiable(rstd_N)
        return out_ND, rstd_N

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor, _: Any) -> tuple[Any, ...]:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grads = ctx.kernels.norm_backward(grad_ND, *ctx.saved_tensors, ctx.offset, wants_x, wants_weight)
        return *grads, None, None, None


# --- gate --------------------------------------------------------------------------------------------------


def gated(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up``; keeps gate and up, not the activated gate.

    Source: Shazeer, GLU Variants Improve Transformer (arXiv:2002.05202).
    """
    kernels = current()
    out: Tensor = _Gated.apply(gate_NF, up_NF, activation, kernels)  # type: ignore[no-untyped-call]
    return _remember(out, _product_of(kernels, activation), gate_NF, up_NF)


def _product_of(kernels: Kernels, activation: Activation) -> Make:
    return Make(lambda gate_NF, up_NF: kernels.gate(gate_NF, up_NF, activation))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, activation: Activation, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels.gate(gate_NF, up_NF, activation)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Any, ...]:
        wants_gate, wants_up = ctx.needs_input_grad[:2]
        grads = ctx.kernels.gate_backward(grad_NF, *ctx.saved_tensors, ctx.activation, wants_gate, wants_up)
        return *grads, None, None
