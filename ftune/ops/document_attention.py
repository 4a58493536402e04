"""Causal attention inside the documents of a packed row, one document after another.

A mask over the whole row costs ``L^2`` scores a head, of which packed documents use a small part, and it makes every
layer keep repeated keys and values and a copy of the mask. Here a row costs ``sum of l^2`` and keeps the queries,
keys, values and outputs as they are, in the dtype in which they came.

On the CPU short documents are computed by plain products, a block of queries at a time against the keys up to its end:
half of the scores of a square, and no block of scores leaves the cache. All of it is fp32 whatever the dtype: of these
sizes products in 16 bits are no faster, they bring conversions, and oneDNN keeps a kernel of over half a MiB for each
shape of one. The order of work is FlashAttention's (Dao et al., arXiv:2205.14135), without its running maximum: a block
sees all of its keys at once. Longer documents take torch's fused kernel.

Shape suffixes: H query heads, K key and value heads, G = H / K, L tokens of the row, T tokens of a document, B queries
of a block, R = B G, E keys that a block sees, D width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["document_attention"]

BLOCK = 64
"""Queries of a block, at least: of 48, 64, 96 and 128 the fastest on the whole."""

LONG = 1024
"""Tokens beyond which the fused kernel, in the dtype of its input, is faster."""

LONG_IN_TILES = 384
"""The same in bf16 where the CPU multiplies tiles of it (AMX), which the fused kernel makes use of."""

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_softmax_backward = torch.ops.aten._softmax_backward_data.out


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
        longest = _longest_by_blocks(query_HLD.dtype)
        # Autocast would round the scores to 16 bits.
        with torch.autocast("cpu", enabled=False):
            for start, end in zip(borders, borders[1:], strict=False):
                query, key, value = (x[:, start:end] for x in (query_HLD, key_KLD, value_KLD))
                out = out_LHD[start:end].transpose(0, 1)
                if end - start <= longest:
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
        longest = _longest_by_blocks(query_HLD.dtype)
        # Laid out as the projections' outputs are, whose gradients these become: (L, H, D) in memory.
        grads = [
            torch.empty(x.shape[1], x.shape[0], x.shape[2], dtype=x.dtype, device=x.device).transpose(0, 1)
            for x in (query_HLD, key_KLD, value_KLD)
        ]
        for start, end in zip(ctx.borders, ctx.borders[1:], strict=False):
            query, key, value = (x[:, start:end] for x in (query_HLD, key_KLD, value_KLD))
            out, grad_out = (x[start:end].transpose(0, 1) for x in (out_LHD, grad_LHD))
            into = tuple(grad[:, start:end] for grad in grads)
            if end - start <= longest:
                _by_blocks_backward(query, key, value, grad_out, ctx.scale, into)
            else:
                _fused_backward_into(query, key, value, out, grad_out, next(logsumexps), ctx.scale, into)
        return (*grads, None, None)


def _longest_by_blocks(dtype: torch.dtype) -> int:
    return LONG_IN_TILES if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else LONG


# --- by blocks of queries ----------------------------------------------------------------------------------


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """Where blocks of queries begin and end: alike in size, multiples of 8, from ``BLOCK`` to less than twice that."""
    size = -(-length // max(1, length // BLOCK))
    size = -(-size // 8) * 8
    return ((start, min(start + size, length)) for start in range(0, length, size))


@lru_cache(maxsize=64)
def _hidden_RB(queries: int, groups: int) -> Tensor:
    """-inf where a query must not see a key of its own block, for the ``groups`` heads of each query."""
    return torch.full((queries, queries), -math.inf).triu(1).repeat_interleave(groups, 0)


def _rows_KRD(x_HBD: Tensor, key_heads: int) -> Tensor:
    """What queries of a block have, in fp32: under each key head its query heads, side by side for each query."""
    heads, queries, dim = x_HBD.shape
    rows = torch.empty(key_heads, queries, heads // key_heads, dim)
    return rows.copy_(x_HBD.view(key_heads, -1, queries, dim).transpose(1, 2)).view(key_heads, -1, dim)


def _put_rows(rows_KRD: Tensor, into_HBD: Tensor) -> None:
    """The other way around, in the dtype of ``into_HBD``."""
    heads, queries, dim = into_HBD.shape
    into_HBD.view(len(rows_KRD), -1, queries, dim).copy_(rows_KRD.view(len(rows_KRD), queries, -1, dim).transpose(1, 2))


def _shares_KRE(query_KRD: Tensor, key_KDE: Tensor, queries: int) -> Tensor:
    """Attention weights."""
    scores_KRE = torch.bmm(query_KRD, key_KDE)
    scores_KRE[:, :, -queries:].add_(_hidden_RB(queries, query_KRD.shape[1] // queries))
    return torch.softmax(scores_KRE, dim=-1, out=scores_KRE)


def _by_blocks(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor, scale: float, out_HTD: Tensor) -> None:
    key_heads, length, _ = key_KTD.shape
    key_KDT, value_KTD = torch.mul(key_KTD.float(), scale).transpose(1, 2), value_KTD.float()
    for start, end in _blocks(length):
        query_KRD = _rows_KRD(query_HTD[:, start:end], key_heads)
        shares_KRE = _shares_KRE(query_KRD, key_KDT[:, :, :end], end - start)
        _put_rows(torch.bmm(shares_KRE, value_KTD[:, :end]), out_HTD[:, start:end])


def _by_blocks_backward(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    grad_HTD: Tensor,
    scale: float,
    into: tuple[Tensor, ...],
) -> None:
    key_heads, length, _ = key_KTD.shape
    grad_query_HTD, grad_key_KTD, grad_value_KTD = into
    key_KTD, value_KDT = torch.mul(key_KTD.float(), scale), value_KTD.float().transpose(1, 2)
    key_KDT = key_KTD.transpose(1, 2)
    # Sums over blocks, in fp32: (K, T, D)
    sum_key, sum_value = torch.zeros_like(key_KTD), torch.zeros_like(key_KTD)
    for start, end in _blocks(length):
        query_KRD, grad_KRD = (_rows_KRD(x[:, start:end], key_heads) for x in (query_HTD, grad_HTD))
        shares_KRE = _shares_KRE(query_KRD, key_KDT[:, :, :end], end - start)
        sum_value[:, :end].baddbmm_(shares_KRE.transpose(1, 2), grad_KRD)
        # Of the shares, then in their place of the scores.
        grad_KRE = torch.bmm(grad_KRD, value_KDT[:, :, :end])
        _softmax_backward(grad_KRE, shares_KRE, -1, torch.float32, grad_input=grad_KRE)
        _put_rows(torch.bmm(grad_KRE, key_KTD[:, :end]), grad_query_HTD[:, start:end])
        sum_key[:, :end].baddbmm_(grad_KRE.transpose(1, 2), query_KRD)
    grad_key_KTD.copy_(sum_key.mul_(scale))
    grad_value_KTD.copy_(sum_value)


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
