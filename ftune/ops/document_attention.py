"""Causal attention inside the documents of a packed row, one document after another.

A mask over the whole row costs ``L^2`` scores a head, of which packed documents use a small part, and it makes every
layer keep repeated keys and values and a copy of the mask. Here a row costs ``sum of l^2`` and keeps the queries,
keys, values and outputs as they are, in the dtype in which they came.

On the CPU documents of up to ``LONG`` tokens are computed by plain products, a block of queries at a time against the
keys up to its end: half of the scores of a square, and no block of scores leaves the cache. Scores and their softmax
are fp32 whatever the dtype. The order of work is FlashAttention's (Dao et al., arXiv:2205.14135), without its running
maximum: a block sees all of its keys at once. Longer documents take torch's fused kernel.

Shape suffixes: H query heads, K key and value heads, G = H / K, L tokens of the row, T tokens of a document, B queries
of a block, R = G B, E keys that a block sees, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["document_attention"]

BLOCK = 64
"""Queries of a block, at least: of 48, 64, 96 and 128 the fastest on the whole."""

LONG = 1024
"""Tokens beyond which the fused kernel, in the dtype of its input, is faster."""

STEP = 16
"""Documents are computed as if they had a multiple of so many tokens: behind them lies what none of their queries sees.
For every shape of a product in 16 bits oneDNN keeps a kernel of some 0.2 MiB, among the tensors of a step."""

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
        logsumexps_HT: list[Tensor] = []  # of the long documents
        for start, end in zip(borders, borders[1:], strict=False):
            query, key, value = (_document(x, start, end) for x in (query_HLD, key_KLD, value_KLD))
            out = out_LHD[start:end].transpose(0, 1)
            # Autocast would round the scores to 16 bits.
            with torch.autocast("cpu", enabled=False):
                if end - start <= LONG:
                    _by_blocks(query, key, value, scale, out)
                else:
                    logsumexps_HT.append(_fused_into(query, key, value, scale, out))
        ctx.save_for_backward(query_HLD, key_KLD, value_KLD, out_LHD, *logsumexps_HT)
        ctx.borders, ctx.scale = borders, scale
        return out_LHD

    @staticmethod
    def backward(ctx: Any, grad_LHD: Tensor) -> tuple[Any, ...]:
        query_HLD, key_KLD, value_KLD, out_LHD, *logsumexps_HT = ctx.saved_tensors
        logsumexps = iter(logsumexps_HT)
        # Laid out as the projections' outputs are, whose gradients these become: (L, H, D) in memory.
        grads = [
            torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device).transpose(0, 1)
            for x in (query_HLD, key_KLD, value_KLD)
        ]
        for start, end in zip(ctx.borders, ctx.borders[1:], strict=False):
            query, key, value = (_document(x, start, end) for x in (query_HLD, key_KLD, value_KLD))
            out, grad_out = (x[start:end].transpose(0, 1) for x in (out_LHD, grad_LHD))
            into = tuple(grad[:, start:end] for grad in grads)
            if end - start <= LONG:
                _by_blocks_backward(query, key, value, grad_out, ctx.scale, into)
            else:
                _fused_backward_into(query, key, value, out, grad_out, next(logsumexps), ctx.scale, into)
        return (*grads, None, None)


def _document(x_HLD: Tensor, start: int, end: int) -> Tensor:
    """A document, and behind it what makes its length a multiple of ``STEP``: the next one's tokens, or zeros."""
    wide = end if end - start > LONG else start + -(-(end - start) // STEP) * STEP
    missing = wide - x_HLD.shape[1]
    return functional.pad(x_HLD[:, start:], (0, 0, 0, missing)) if missing > 0 else x_HLD[:, start:wide]


# --- by blocks of queries ----------------------------------------------------------------------------------


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries begin and end: alike in size, multiples of 8, from ``BLOCK`` to less than twice that."""
    size = -(-length // max(1, length // BLOCK))
    size = -(-size // 8) * 8
    return ((start, min(start + size, length)) for start in range(0, length, size))


@lru_cache(maxsize=64)
def _hidden_RB(queries: int, groups: int) -> Tensor:
    """-inf where a query must not see a key of its own block, for ``groups`` query heads below each other."""
    return torch.full((queries, queries), -math.inf).triu(1).repeat(groups, 1)


def _shares(query_KRD: Tensor, key_KDE: Tensor, queries: int, scale: float) -> Tensor:
    """Attention weights (K, R, E) in fp32: scores that were rounded to 16 bits would be off by up to 1/256."""
    scores_KRE = torch.bmm(query_KRD.float() * scale, key_KDE)
    scores_KRE[:, :, -queries:].add_(_hidden_RB(queries, query_KRD.shape[1] // queries))
    return torch.softmax(scores_KRE, dim=-1)


def _by_blocks(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, out_HTD: Tensor) -> None:
    """Attend, and keep as many of the outputs as ``out_HTD`` has room for."""
    key_heads, length, dim = key_KTD.shape
    key_KDT = key_KTD.float().transpose(1, 2)
    for start, end in _blocks(length):
        query_KRD = query_HTD[:, start:end].reshape(key_heads, -1, dim)
        shares_KRE = _shares(query_KRD, key_KDT[:, :, :end], end - start, scale)
        found_KRD = torch.bmm(shares_KRE.to(value_KTD.dtype), value_KTD[:, :end])
        into = out_HTD[:, start:end]
        into.copy_(found_KRD.view(-1, end - start, dim)[:, : into.shape[1]])


def _by_blocks_backward(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    grad_HTD: Tensor,
    scale: float,
    into: tuple[Tensor, ...],
) -> None:
    """Put the gradients of as many tokens as ``grad_HTD`` has into ``into``; those of outputs behind them are zero."""
    (key_heads, length, dim), tokens = key_KTD.shape, grad_HTD.shape[1]
    grad_query_HTD, grad_key_KTD, grad_value_KTD = into
    key_KDT, value_KDT = key_KTD.float().transpose(1, 2), value_KTD.transpose(1, 2)
    # Sums over blocks, in fp32: (K, T, D)
    sum_key, sum_value = (torch.zeros(x.shape, dtype=torch.float32) for x in (key_KTD, value_KTD))
    for start, end in _blocks(length):
        query_KRD = query_HTD[:, start:end].reshape(key_heads, -1, dim)
        grad = functional.pad(grad_HTD[:, start:end], (0, 0, 0, max(0, end - max(start, tokens))))
        grad_KRD = grad.reshape(key_heads, -1, dim)
        shares_KRE = _shares(query_KRD, key_KDT[:, :, :end], end - start, scale)
        sum_value[:, :end] += torch.bmm(shares_KRE.to(grad_KRD.dtype).transpose(1, 2), grad_KRD)
        grad_shares_KRE = torch.bmm(grad_KRD, value_KDT[:, :, :end]).float()
        # Of the scaled scores; the scale follows on the products, which are smaller.
        grad_scores_KRE = torch.ops.aten._softmax_backward_data(grad_shares_KRE, shares_KRE, -1, torch.float32)
        grad_scores_KRE = grad_scores_KRE.to(query_HTD.dtype)
        found_KRD = torch.bmm(grad_scores_KRE, key_KTD[:, :end])
        into_query = grad_query_HTD[:, start:end]
        torch.mul(found_KRD.view(-1, end - start, dim)[:, : into_query.shape[1]], scale, out=into_query)
        sum_key[:, :end] += torch.bmm(grad_scores_KRE.transpose(1, 2), query_KRD)
    grad_key_KTD.copy_(sum_key[:, :tokens].mul_(scale))
    grad_value_KTD.copy_(sum_value[:, :tokens])


# --- longer ones: the fused kernel -------------------------------------------------------------------------


def _ready(x: Tensor, heads: int) -> Tensor:
    """One head for every query head, as the kernel takes it: (1, H, T, D)."""
    return (x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0))[None]


def _fused_into(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, out_HTD: Tensor) -> Tensor:
    """Returns the logarithms of the sums of exponentials, (H, T) fp32."""
    query, key, value = (_ready(x, len(query_HTD)) for x in (query_HTD, key_KTD, value_KTD))
    out, logsumexp = _fused(query, key, value, 0.0, True, scale=scale)
    out_HTD.copy_(out[0])
    found: Tensor = logsumexp[0]
    return found


def _fused_backward_into(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    out_HTD: Tensor,
    grad_HTD: Tensor,
    logsumexp_HT: Tensor,
    scale: float,
    into: tuple[Tensor, ...],
) -> None:
    heads = len(query_HTD)
    query, key, value, out, grad = (_ready(x, heads) for x in (query_HTD, key_KTD, value_KTD, out_HTD, grad_HTD))
    found = _fused_backward(grad, query, key, value, out, logsumexp_HT[None], 0.0, True, scale=scale)
    for target, grad_HTD in zip(into, found, strict=True):
        # The gradient of a key head from those of the query heads that read it.
        target.copy_(grad_HTD[0].reshape(len(target), -1, *target.shape[1:]).sum(1))
