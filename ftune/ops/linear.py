"""Linear layers that keep little for the backward pass: a trained weight, a low-rank update, DoRA's magnitudes.

Both keep their input as ``ftune.ops.recompute`` remembers it, cast weights where they are used, and compute no
gradient that nobody asked for.

Shape suffixes: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.ops.recompute import Make, keep, kept_again

__all__ = ["Adapted", "cast_linear", "direction_norms", "low_rank_linears", "low_rank_update", "scale_directions"]


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


class Adapted(NamedTuple):
    """A frozen linear layer with a low-rank update: ``x W^T + b + scale * (x A^T) B^T``.

    Source: LoRA (Hu et al., arXiv:2106.09685), sec. 4.1.

    Attributes:
        weight: W (O, I) in the dtype of the input, or what ``dense`` makes it of; None: no W.
        bias_O: The frozen bias, in that dtype.
        a_RI: A, of any dtype.
        b_OR: B, of any dtype.
        scale: Factor of the update.
        dense: Makes W of ``weight``; called forwards and backwards, so that W is not kept. None: ``weight`` is W.
    """

    weight: Tensor | None
    bias_O: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
    scale: float
    dense: Callable[[Tensor], Tensor] | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RI.shape[0]

    def whole(self) -> Tensor:
        """W, where there is one."""
        assert self.weight is not None
        return self.weight if self.dense is None else self.dense(self.weight)


def low_rank_linears(x_NI: Tensor, layers: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """What adapted layers make of one input, which is read once for all of their A; keeps it and ``x A^T`` only.

    The product with W is added to the update where it is computed, and the input's gradients of all layers to each
    other: some passes less over what is large, and in 16 bits a sum is rounded once.

    Args:
        x_NI: Input, in the dtype in which all products are computed.
        layers: The layers.

    Returns:
        (N, O) of each, in the input's dtype.
    """
    make, parts = keep(x_NI)
    trained = [parameter for layer in layers for parameter in (layer.a_RI, layer.b_OR)]
    outs: tuple[Tensor, ...] = _LowRank.apply(x_NI, layers, make, parts, *trained)  # type: ignore[no-untyped-call]
    return outs


def low_rank_update(x_NI: Tensor, base_NO: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """``base + scale * (x A^T) B^T`` beside a layer that computed ``base`` by itself."""
    (update_NO,) = low_rank_linears(x_NI, [Adapted(None, None, a_RI, b_OR, scale)])
    return update_NO.add_(base_NO)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[Adapted], make: Make | None, parts: tuple[Tensor, ...], *trained: Tensor
    ) -> tuple[Tensor, ...]:
        # A of all layers, below each other.
        a_RI = (layers[0].a_RI if len(layers) == 1 else torch.cat([layer.a_RI for layer in layers])).to(x.dtype)
        bs_OR = [layer.b_OR.to(x.dtype) for layer in layers]
        x_NI, xa_NR = _rows(x), _scale(F.linear(x, a_RI), layers)
        outs = []
        for layer, at_NR, b_OR in zip(layers, _by_layer(xa_NR, layers, -1), bs_OR, strict=True):
            out = F.linear(at_NR, b_OR, layer.bias_O)
            if layer.weight is not None:
                _rows(out).addmm_(x_NI, layer.whole().t())
            outs.append(out)
        if make is not None and any(ctx.needs_input_grad[4::2]):
            make.will_be_asked()
        # Of A and B what was computed with: to cast them again costs as much time as a product with them.
        ctx.save_for_backward(xa_NR, a_RI, *bs_OR, *parts)
        ctx.layers, ctx.make, ctx.shape = layers, make, x.shape
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        layers, count = ctx.layers, len(ctx.layers)
        xa, a_RI, *saved = ctx.saved_tensors
        bs_OR, parts = saved[:count], saved[count:]
        wanted = ctx.needs_input_grad[4:]
        grads_NO = [None if grad is None else _rows(grad) for grad in grads]
        found: list[Tensor | None] = [None] * (2 * count)
        # What reaches x A^T; zeros from an output that nobody used.
        xa_NR = _rows(xa)
        all_used = all(grad is not None for grad in grads)
        grad_xa_NR = torch.empty_like(xa_NR) if all_used else torch.zeros_like(xa_NR)
        by_layer = zip(_by_layer(xa_NR, layers, 1), _by_layer(grad_xa_NR, layers, 1), strict=True)
        for i, (at_NR, grad_at_NR) in enumerate(by_layer):
            grad_NO = grads_NO[i]
            if grad_NO is not None:
                torch.mm(grad_NO, bs_OR[i], out=grad_at_NR)
                if wanted[2 * i + 1]:
                    found[2 * i + 1] = _product(grad_NO.t(), at_NR, layers[i].b_OR.dtype)
        _scale(grad_xa_NR, layers)
        if any(wanted[::2]):
            x_NI = _rows(kept_again(ctx.make, tuple(parts)))
            grad_a = _product(grad_xa_NR.t(), x_NI, layers[0].a_RI.dtype)
            for i, part in enumerate(_by_layer(grad_a, layers, 0)):
                found[2 * i] = None if grads_NO[i] is None else part
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_xa_NR, a_RI)
            for layer, grad_NO in zip(layers, grads_NO, strict=True):
                if grad_NO is not None and layer.weight is not None:
                    grad_x.addmm_(grad_NO, layer.whole())
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, None, *found


def _by_layer(stacked: Tensor, layers: Sequence[Adapted], dim: int) -> Sequence[Tensor]:
    """What belongs to each layer's rank of what lies beside or below each other."""
    if len(layers) == 1:
        return (stacked,)
    return stacked.split_with_sizes([layer.rank for layer in layers], dim)


def _scale(xa: Tensor, layers: Sequence[Adapted]) -> Tensor:
    """Each layer's columns times its scale, in place."""
    if len({layer.scale for layer in layers}) == 1:
        return xa if layers[0].scale == 1.0 else xa.mul_(layers[0].scale)
    for layer, part in zip(layers, _by_layer(xa, layers, -1), strict=True):
        part.mul_(layer.scale)
    return xa


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
