"""Linear layers that keep little for the backward pass: a trained weight, a low-rank update, DoRA's magnitudes.

Both keep their input as ``ftune.ops.recompute`` remembers it, cast weights where they are used, and compute no
gradient that nobody asked for.

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.ops.recompute import Make, keep, kept_again

__all__ = ["cast_linear", "direction_norms", "low_rank_linear", "low_rank_update", "scale_directions"]


def cast_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x W^T + b`` in ``dtype`` with a trained weight of a wider one, which is cast when it is used.

    Autocast keeps the cast weights of all layers from the forward pass to the backward pass: half of the model again.

    Args:
        x_NI: Input, cast to ``dtype``.
        weight_OI: The trained weight.
        bias_O: Its bias.
        dtype: What the product is computed in.

    Returns:
        (N, O) in ``dtype``. The gradient of the weight is in the weight's dtype.
    """
    make, parts = keep(x_NI)
    out: Tensor = _CastLinear.apply(x_NI, weight_OI, bias_O, dtype, make, parts)  # type: ignore[no-untyped-call]
    return out


class _CastLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype,
        make: Make | None,
        parts: tuple[Tensor, ...],
    ) -> Tensor:
        low_NI = x_NI.to(dtype)
        if ctx.needs_input_grad[1]:
            if make is not None:
                make.will_be_asked()
            ctx.save_for_backward(weight_OI, *((low_NI,) if make is None else parts))
        else:
            ctx.save_for_backward(weight_OI)
        ctx.make, ctx.dtype, ctx.input_dtype = make, dtype, x_NI.dtype
        return F.linear(low_NI, weight_OI.to(dtype), None if bias_O is None else bias_O.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Any, ...]:
        weight_OI, *parts = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ weight_OI.to(ctx.dtype)).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            low_NI = kept_again(ctx.make, tuple(parts)).to(ctx.dtype)
            grad_weight = _product(_rows(grad_NO).T, _rows(low_NI), weight_OI.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = _rows(grad_NO).float().sum(0)
        return grad_x, grad_weight, grad_bias, None, None, None


def low_rank_linear(
    x_NI: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    dense: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``x W^T + b + scale * (x A^T) B^T`` over a frozen weight; keeps ``x`` and ``x A^T`` only.

    The product with W is added to the update where it is computed: one pass less over the output, and in 16 bits the
    sum is rounded once.

    Source: LoRA (Hu et al., arXiv:2106.09685), sec. 4.1.

    Args:
        x_NI: Input, in the dtype in which all products are computed.
        weight: The frozen W (O, I) in that dtype, or what ``dense`` makes it of.
        bias_O: Its frozen bias.
        a_RI: A, of any dtype.
        b_OR: B, of any dtype.
        scale: Factor of the update.
        dense: Makes W; called forwards and backwards, so that W is not kept. None: ``weight`` is W.

    Returns:
        (N, O) in the input's dtype.
    """
    make, parts = keep(x_NI)
    out: Tensor = _LowRank.apply(x_NI, None, weight, bias_O, a_RI, b_OR, scale, dense, make, parts)  # type: ignore[no-untyped-call]
    return out


def low_rank_update(x_NI: Tensor, base_NO: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """``base + scale * (x A^T) B^T`` beside a layer that computed ``base`` by itself."""
    make, parts = keep(x_NI)
    out: Tensor = _LowRank.apply(x_NI, base_NO, None, None, a_RI, b_OR, scale, None, make, parts)  # type: ignore[no-untyped-call]
    return out


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        base_NO: Tensor | None,
        weight: Tensor | None,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dense: Callable[[Tensor], Tensor] | None,
        make: Make | None,
        parts: tuple[Tensor, ...],
    ) -> Tensor:
        # A carries the scale here and below: it is smaller than the input, and B's gradient comes out scaled.
        xa_NR = x_NI @ _low(a_RI, x_NI.dtype, scale).T
        b_RO = b_OR.to(x_NI.dtype).T
        # Not a view: DoRA scales it in place.
        out = x_NI.new_empty(*x_NI.shape[:-1], len(b_OR))
        if weight is not None:
            weight_OI = weight if dense is None else dense(weight)
            if bias_O is None:
                torch.mm(_rows(xa_NR), b_RO, out=_rows(out))
            else:
                torch.addmm(bias_O, _rows(xa_NR), b_RO, out=_rows(out))
            _rows(out).addmm_(_rows(x_NI), weight_OI.T)
        else:
            assert base_NO is not None
            torch.addmm(_rows(base_NO), _rows(xa_NR), b_RO, out=_rows(out))
        if make is not None and ctx.needs_input_grad[4]:
            make.will_be_asked()
        ctx.save_for_backward(weight, a_RI, b_OR, xa_NR, *parts)
        ctx.scale, ctx.dense, ctx.make = scale, dense, make
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, a_RI, b_OR, xa_NR, *parts = ctx.saved_tensors
        wants_x, wants_base, _, _, wants_a, wants_b = ctx.needs_input_grad[:6]
        grad_NO = _rows(grad)
        grad_x = grad_a = grad_b = None
        grad_xa_NR = grad_NO @ b_OR.to(grad.dtype) if wants_x or wants_a else None
        if wants_b:
            grad_b = _product(grad_NO.T, _rows(xa_NR), b_OR.dtype)
        if wants_a:
            assert grad_xa_NR is not None
            x_NI = _rows(kept_again(ctx.make, tuple(parts)))
            grad_a = _product(grad_xa_NR.T, x_NI, a_RI.dtype)
            if ctx.scale != 1.0:
                grad_a.mul_(ctx.scale)
        if wants_x:
            assert grad_xa_NR is not None
            grad_x = grad_xa_NR @ _low(a_RI, grad.dtype, ctx.scale)
            if weight is not None:
                grad_x.addmm_(grad_NO, weight if ctx.dense is None else ctx.dense(weight))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, grad if wants_base else None, None, None, grad_a, grad_b, None, None, None, None


def _low(weight: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """``scale * weight`` in a dtype, by one operation."""
    if scale == 1.0:
        return weight.to(dtype)
    return torch.mul(weight, scale, out=torch.empty_like(weight, dtype=dtype))


def _product(one: Tensor, other: Tensor, dtype: torch.dtype) -> Tensor:
    """``one @ other`` in a dtype, which the sums are not rounded on the way to where the device can do that."""
    if one.is_cuda and dtype == torch.float32 != one.dtype:
        return torch.mm(one, other, out_dtype=dtype)
    return (one @ other).to(dtype)


# --- DoRA --------------------------------------------------------------------------------------------------


@torch.no_grad()
def direction_norms(squares_O: Tensor, wa_RO: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Norms of the rows of ``W + scale * B A``, without making that matrix.

    ``||w + s A^T b||^2 = ||w||^2 + 2 s b (A w) + s^2 b (A A^T) b`` for a row ``w`` of W and ``b`` of B.

    Args:
        squares_O: Squared norms of the rows of W, fp32.
        wa_RO: ``A W^T``. Rounded to bf16 it moves a norm by about 1e-5 of itself: the update is small beside W.
        a_RI: A.
        b_OR: B.
        scale: Factor of the update.

    Returns:
        (O,) fp32, detached: DoRA takes the norms as constants (Liu et al., arXiv:2402.09353, sec. 4.3).
    """
    with torch.autocast(b_OR.device.type, enabled=False):
        a_RI, b_OR = a_RI.float(), b_OR.float() * scale
        squares_O = squares_O + 2 * (b_OR * wa_RO.float().T).sum(1) + ((b_OR @ (a_RI @ a_RI.T)) * b_OR).sum(1)
        return squares_O.clamp_min_(torch.finfo(torch.float32).tiny).sqrt_()


def scale_directions(out_NO: Tensor, magnitude_O: Tensor, norms_O: Tensor) -> Tensor:
    """``magnitude / norm * out``, in place; keeps the result, which what comes next often keeps as well.

    Args:
        out_NO: Product with the adapted matrix, without a bias, which nothing else needs; it becomes the result.
        magnitude_O: Trained magnitudes. The gradient of one that is exactly 0 is 0.
        norms_O: Of the rows of the adapted matrix, constants.

    Returns:
        (N, O) in ``out``'s dtype, computed in fp32.
    """
    out: Tensor = _ScaleDirections.apply(out_NO, magnitude_O, norms_O)  # type: ignore[no-untyped-call]
    return out


class _ScaleDirections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_NO: Tensor, magnitude_O: Tensor, norms_O: Tensor) -> Tensor:
        factor_O = magnitude_O.float() / norms_O
        out_NO.mul_(factor_O)
        ctx.mark_dirty(out_NO)
        ctx.save_for_backward(out_NO, magnitude_O, factor_O)
        return out_NO

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Any, ...]:
        scaled_NO, magnitude_O, factor_O = ctx.saved_tensors
        grad_out = grad_magnitude = None
        if ctx.needs_input_grad[1]:
            sums_O = (grad_NO * scaled_NO).flatten(0, -2).sum(0, dtype=torch.float32)
            grad_magnitude = torch.where(magnitude_O == 0, 0.0, sums_O / magnitude_O)
        if ctx.needs_input_grad[0]:
            grad_out = torch.mul(grad_NO, factor_O, out=torch.empty_like(grad_NO))
        return grad_out, grad_magnitude, None


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x.reshape(-1, x.shape[-1])
