"""Shifted sparse attention (S2-Attn): attention inside groups, half of the heads shifted by half a group.

Source: LongLoRA (Chen et al., arXiv:2309.12307), sec. 3.2. Positions ``0 ... L-1`` of a row fall into groups of
``S``. The first half of the heads has borders at ``S, 2S, ...``, the second half at ``S/2, 3S/2, ...``, so that what
one half keeps apart the other joins. A query attends causally to the keys of its own group.

The paper rolls the shifted half around, which puts the end of the row beside its beginning: there the early
tokens would see the late ones. Here the row's two ends are groups of their own, as in the paper's code for flash
attention. Borders count from the row's beginning, so neither padding behind a row nor a length that is no multiple of
``S`` changes what a token sees.

Shape suffixes: B rows, H query heads, K key and value heads, L tokens, D width of a head, S tokens in a group,
N groups of one length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["s2_attention", "shifted_heads"]


def shifted_heads(heads: int) -> int:
    """How many of the heads are shifted: the larger half, the last ones."""
    return heads - heads // 2


def s2_attention(
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    group_size: int,
    mask_B1LL: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attend inside groups, causally.

    Costs ``L S`` scores a head instead of ``L^2``: groups of one length are rows of one batched product.

    Args:
        query_BHLD: Queries, any float dtype.
        key_BKLD: Keys; H is a multiple of K.
        value_BKLD: Values.
        group_size: Tokens in a group, even.
        mask_B1LL: True where a query may see a key, causal already; None: wherever causality allows. A query whose
            group holds no key that it may see (padding) gives 0.
        dropout: Probability with which an attention weight is dropped.
        scale: Factor of the scores; None: ``1 / sqrt(D)``.

    Returns:
        (B, L, H, D): heads beside each other, as the output projection reads them.
    """
    heads = query_BHLD.shape[1]
    split = heads - shifted_heads(heads)
    repeats = heads // key_BKLD.shape[1]
    # Where a key head is read from both sides of the split, too, every query head gets its own.
    if repeats > 1 and (split % repeats or not _can_share(query_BHLD, key_BKLD, value_BKLD, mask_B1LL, dropout)):
        key_BKLD, value_BKLD = (
            x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for x in (key_BKLD, value_BKLD)
        )
        repeats = 1
    halves = [
        _in_groups(
            query_BHLD[:, begin:end],
            key_BKLD[:, begin // repeats : end // repeats],
            value_BKLD[:, begin // repeats : end // repeats],
            first,
            group_size,
            mask_B1LL,
            dropout,
            scale,
        )
        for begin, end, first in ((0, split, 0), (split, heads, group_size // 2))
        if begin < end
    ]
    return torch.cat(halves, dim=2)


def _can_share(
    query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, mask_B1LL: Tensor | None, dropout: float
) -> bool:
    """Whether a kernel that keeps no scores lets query heads share a key head; copies are no faster then."""
    # On CUDA a mask or fp32 would fall back to plain products, which keep all scores. With a mask copies are made on
    # the CPU too: they are planned for.
    if mask_B1LL is not None or not query_BHLD.is_cuda:
        return mask_B1LL is None and query_BHLD.is_cpu
    params = torch.backends.cuda.SDPAParams(query_BHLD, key_BKLD, value_BKLD, None, dropout, True, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def _in_groups(
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    first: int,
    group_size: int,
    mask_B1LL: Tensor | None,
    dropout: float,
    scale: float | None,
) -> Tensor:
    """Attend in ``first`` tokens, in groups of ``group_size``, and in what is left: (B, L, H, D)."""
    rows, heads, length, _ = query_BHLD.shape
    begin = min(first, length)
    whole = (length - begin) // group_size
    rest = begin + whole * group_size
    pieces = []
    for start, end, count in ((0, begin, 1), (begin, rest, whole), (rest, length, 1)):
        if start == end:
            continue
        mask = None
        if mask_B1LL is not None:
            mask = _diagonal_blocks(mask_B1LL[:, :, start:end, start:end], count)
        out_NHSD = F.scaled_dot_product_attention(
            _fold(query_BHLD[:, :, start:end], count),
            _fold(key_BKLD[:, :, start:end], count),
            _fold(value_BKLD[:, :, start:end], count),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=heads != key_BKLD.shape[1],
        )
        pieces.append(out_NHSD.transpose(1, 2).reshape(rows, end - start, heads, -1))
    return torch.cat(pieces, dim=1)


def _fold(states_BHLD: Tensor, count: int) -> Tensor:
    """Make every one of ``count`` equal groups a row: (B * N, H, S, D)."""
    rows, heads, length, dim = states_BHLD.shape
    groups_BHNSD = states_BHLD.reshape(rows, heads, count, length // count, dim)
    return groups_BHNSD.transpose(1, 2).flatten(0, 1)


def _diagonal_blocks(mask_B1LL: Tensor, count: int) -> Tensor:
    """The part of a mask inside each of ``count`` equal groups: (B * N, 1, S, S)."""
    rows, _, length, _ = mask_B1LL.shape
    size = length // count
    blocks_B1NSNS = mask_B1LL.reshape(rows, 1, count, size, count, size)
    return blocks_B1NSNS.diagonal(dim1=2, dim2=4).movedim(-1, 1).flatten(0, 1)
