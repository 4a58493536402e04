"""Causal attention inside the documents of a packed row, one document after another.

A mask over the whole row costs ``L^2`` scores a head, of which packed documents use a small part, and it makes every
layer keep repeated keys and values and a copy of the mask. Here a row costs ``sum of l^2`` and keeps the queries,
keys, values and outputs as they are, in the dtype in which they came.

On the CPU every document is computed in fp32 or in its own dtype, whichever is faster at its length; documents of up
to ``SHORT`` tokens by plain products, for which the fused kernel's blocks are too large.

Shape suffixes: H query heads, K key and value heads, G = H / K, L tokens of the row, T tokens of a document, D width
of a head.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["document_attention"]

SHORT = 160
"""Tokens up to which a document is computed by plain products."""

LONG = 1024
"""Tokens from which the fused kernel computes in the dtype of its input; below, fp32 is faster on a CPU."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def document_attention(
    query_HLD: Tensor, key_KLD: Tensor, value_KLD: Tensor, borders: tuple[int, ...], scale: float | None = None
) -> Tensor:
    """Attend causally inside each document.

    Args:
        query_HLD: Queries, any float dtype, on the CPU.
        key_KLD: Keys; H is a multiple of K.
        value_KLD: Values, as wide as the keys.
        borders: Where documents begin, from 0, and at last L.
        scale: Factor of the scores; None: ``1 / sqrt(D)``.

    Returns:
        (L, H, D) in the dtype of the queries: heads beside each other, as the output projection reads them.
    """
    scale = 1 / math.sqrt(query_HLD.shape[-1]) if scale is None else scale
    out: Tensor = _DocumentAttention.apply(query_HLD, key_KLD, value_KLD, borders, scale)  # type: ignore[no-untyped-call]
    return out


class _DocumentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_HLD: Tensor, key_KLD: Tensor, value_KLD: Tensor, borders: tuple[int, ...], scale: float
    ) -> Tensor:
        heads, length, dim = query_HLD.shape
        out_LHD = query_HLD.new_empty(length, heads, dim)
        logsumexp_HL = torch.empty(heads, length, dtype=torch.float32, device=query_HLD.device)
        for start, end in zip(borders, borders[1:], strict=False):
            query, key, value = (x[:, start:end] for x in (query_HLD, key_KLD, value_KLD))
            out, logsumexp = (_short if end - start <= SHORT else _long)(query, key, value, scale)
            out_LHD[start:end] = out.transpose(0, 1)
            if logsumexp is not None:
                logsumexp_HL[:, start:end] = logsumexp
        ctx.save_for_backward(query_HLD, key_KLD, value_KLD, out_LHD, logsumexp_HL)
        ctx.borders, ctx.scale = borders, scale
        return out_LHD

    @staticmethod
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Any, ...]:
        query_HLD, key_KLD, value_KLD, out_LHD, logsumexp_HL = ctx.saved_tensors
        # Laid out as the projections' outputs are, whose gradients these become: (L, H, D) in memory.
        grads = [
            torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device).transpose(0, 1)
            for x in (query_HLD, key_KLD, value_KLD)
        ]
        for start, end in zip(ctx.borders, ctx.borders[1:], strict=False):
            query, key, value = (x[:, start:end] for x in (query_HLD, key_KLD, value_KLD))
            out, grad_out = (x[start:end].transpose(0, 1) for x in (out_LHD, grad_LHD))
            backward = _short_backward if end - start <= SHORT else _long_backward
            found = backward(query, key, value, out, grad_out, logsumexp_HL[:, start:end], ctx.scale)
            for grad, part in zip(grads, found, strict=True):
                grad[:, start:end] = part
        return (*grads, None, None)


# --- documents for which plain products are faster ---------------------------------------------------------


@lru_cache(maxsize=SHORT)
def _causal_RT(length: int, groups: int) -> Tensor:
    """0 where a query may see a key, else -inf, for ``groups`` query heads below each other: (G T, T)."""
    return torch.full((length, length), -math.inf).triu(1).repeat(groups, 1)


def _folded(x_HTD: Tensor, key_heads: int) -> Tensor:
    """Heads that read one key head below each other: (K, G T, D)."""
    return x_HTD.reshape(key_heads, -1, x_HTD.shape[-1])


def _shares(query_KRD: Tensor, key_KTD: Tensor, scale: float) -> Tensor:
    """Attention weights in fp32, (K, G T, T): scores that were rounded to 16 bits would be off by up to 1/256."""
    length = key_KTD.shape[1]
    causal = _causal_RT(length, query_KRD.shape[1] // length).to(query_KRD.device)
    return torch.softmax(torch.baddbmm(causal, query_KRD.float(), key_KTD.float().transpose(1, 2), alpha=scale), dim=-1)


def _short(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    shares = _shares(_folded(query_HTD, len(key_KTD)), key_KTD, scale)
    return torch.bmm(shares.to(value_KTD.dtype), value_KTD).view(query_HTD.shape), None


def _short_backward(
    query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, _out: Tensor, grad_HTD: Tensor, _lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, grad = (_folded(x, len(key_KTD)) for x in (query_HTD, grad_HTD))
    shares = _shares(query, key_KTD, scale)
    grad_value = torch.bmm(shares.to(grad.dtype).transpose(1, 2), grad)
    grad_shares = torch.bmm(grad, value_KTD.transpose(1, 2)).float()
    grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, torch.float32)
    grad_scores = grad_scores.mul_(scale).to(query.dtype)
    grad_query = torch.bmm(grad_scores, key_KTD).view(query_HTD.shape)
    return grad_query, torch.bmm(grad_scores.transpose(1, 2), query), grad_value


# --- longer ones: the fused kernel -------------------------------------------------------------------------


def _ready(x: Tensor, heads: int) -> Tensor:
    """One head for every query head, in the faster dtype, as the kernel takes it: (1, H, T, D)."""
    x = x.float() if x.shape[1] < LONG else x
    return (x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0))[None]


def _long(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    heads = len(query_HTD)
    query, key, value = (_ready(x, heads) for x in (query_HTD, key_KTD, value_KTD))
    out, logsumexp = _fused(query, key, value, 0.0, True, scale=scale)
    return out[0], logsumexp[0]


def _long_backward(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    out_HTD: Tensor,
    grad_HTD: Tensor,
    logsumexp_HT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = len(query_HTD)
    query, key, value, out, grad = (_ready(x, heads) for x in (query_HTD, key_KTD, value_KTD, out_HTD, grad_HTD))
    grad_query, grad_key, grad_value = _fused_backward(
        grad, query, key, value, out, logsumexp_HT[None], 0.0, True, scale=scale
    )
    return grad_query[0], _summed(grad_key[0], len(key_KTD)), _summed(grad_value[0], len(key_KTD))


def _summed(grad_HTD: Tensor, key_heads: int) -> Tensor:
    """The gradient of a key head from those of the query heads that read it."""
    return grad_HTD if len(grad_HTD) == key_heads else grad_HTD.reshape(key_heads, -1, *grad_HTD.shape[1:]).sum(1)
