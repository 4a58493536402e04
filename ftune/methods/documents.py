"""Attention per document as an attention implementation of transformers.

transformers describes what a query may see as a function of two positions. From it the borders of documents are
read, in ``O(L)``, and handed to every layer in place of a mask of ``L^2``. Whatever is not plain causal attention
inside documents (a window shorter than a document, prefixes that see forwards, a cache) gets the mask that ``sdpa``
would get, and is computed as ``sdpa`` does.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NAME", "register", "room_for"]

NAME = "ftune_documents_sdpa"
"""Holds "sdpa", so that transformers refuses architectures without it; not "flash", which takes another mask."""


def register() -> str:
    """Make it known to transformers; returns the name to build a model with."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    return NAME


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The borders of the documents, or the mask or absence of one that ``sdpa`` takes.

    Borders are (documents + 1,) int32; on a GPU empty documents may follow.
    """
    from transformers.masking_utils import sdpa_mask

    plain = (
        batch_size == 1
        and q_length == kv_length
        and q_offset == kv_offset == 0
        and attention_mask is None
        and mask_function is not None
        and not kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
    )
    if plain:
        borders = _borders(mask_function, q_length, kwargs.get("device", "cpu"))
        if borders is not None:
            return borders
    kwargs |= {"mask_function": mask_function} if mask_function is not None else {}
    found: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **kwargs
    )
    return found


def _borders(sees: Any, length: int, device: Any) -> Tensor | None:
    """Where documents begin, and at last ``length``; None where this is not causal attention inside documents.

    A document begins where a query does not see the position before its own. That every query sees its document's
    first position, not the one before that, and not the position after its own, tells it from windows, blocks
    and prefixes.
    """
    import torch

    zero = torch.zeros((), dtype=torch.long, device=device)
    at = torch.arange(length, device=device)

    def seen(query: Tensor, key: Tensor) -> Tensor:
        found: Tensor = sees(zero, zero, query, key)
        return found.expand(query.shape)

    begins = torch.cat([torch.ones(1, dtype=torch.bool, device=device), ~seen(at[1:], at[:-1])])
    first = torch.where(begins, at, 0).cummax(0).values
    later = at[first > 0]
    right = seen(at, first).all() & ~seen(at[:-1], at[1:]).any() & ~seen(later, first[later] - 1).any()
    if not bool(right):
        return None
    starts = at[begins]
    # On a GPU documents of no tokens stand behind the last one: rows of like many documents have one shape.
    ends = 1 if torch.device(device).type == "cpu" else room_for(len(starts)) - len(starts) + 1
    borders = torch.cat([starts, starts.new_full((ends,), length)]).to(torch.int32)
    borders._ftune_longest = int(borders.diff().max())  # type: ignore[attr-defined]  # asked once, not in every layer
    return borders


def room_for(documents: int) -> int:
    """For how many documents there is room in the borders of a row on a GPU."""
    return max(8, 1 << (documents - 1).bit_length())


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside documents where the borders are given, or where a row is one document; else as ``sdpa``."""
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if torch.is_autocast_enabled(query.device.type):  # which sdpa is cast by
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    borders: list[int] | None = None
    if attention_mask is not None and attention_mask.ndim == 1:
        borders = attention_mask.tolist() if not query.is_cuda else []
    elif attention_mask is None and query.shape[2] == key.shape[2] > 1 and getattr(module, "is_causal", False):
        borders = [0, query.shape[2]]
    odd = (
        dropout
        or query.shape[-1] != value.shape[-1]
        or kwargs.get("is_causal") is False
        or any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    )
    if borders is not None and not odd and not query.is_cuda:
        from ftune.ops.document_attention import document_attention

        rows = [document_attention(*row, tuple(borders), scaling) for row in zip(query, key, value, strict=True)]
        return torch.stack(rows) if len(rows) > 1 else rows[0][None], None
    if attention_mask is not None and attention_mask.ndim == 1:
        if not odd and query.dtype != torch.float32:
            return _varlen(query, key, value, attention_mask, scaling), None
        attention_mask = _mask_of(attention_mask)
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


def _mask_of(borders: Tensor) -> Tensor:
    """The mask (1, 1, L, L) that borders stand for."""
    import torch

    at = torch.arange(int(borders[-1]), device=borders.device)
    document = torch.bucketize(at, borders, right=True)
    return ((document[:, None] == document) & (at[:, None] >= at))[None, None]


@functools.cache
def _asks_for_shared_heads() -> bool:
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _varlen(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, scale: float | None) -> Tensor:
    """Flash attention over documents of any length, in 16 bits on CUDA: (1, L, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    longest: int = getattr(borders, "_ftune_longest", None) or int(borders.diff().max())
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    # torch 2.11 shares heads unasked; later ones want to be told.
    shared: dict[str, Any] = {"enable_gqa": True} if key.shape[1] != query.shape[1] and _asks_for_shared_heads() else {}
    out = varlen_attn(query, key, value, borders, borders, longest, longest, scale=scale, window_size=(-1, 0), **shared)
    assert not isinstance(out, tuple)
    return out[None]
