"""Prefixes of keys and values as PEFT packs them, and an encoder that starts at given ones.

Shapes: V virtual tokens, W = 2 * layers * kv_heads * head_dim, E width of the encoder, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pack_prefix", "solve_last_layer"]


def pack_prefix(cache: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """One row a virtual token: its key and value of the first block, of the second, and so on.

    cache: for each block, keys and values of (1, K, V, D). Returns (V, W) in fp32.
    Source: ``PeftModel.get_prompt``, which reads rows in this order.
    """
    pairs = [tensor[0].transpose(0, 1).flatten(1) for block in cache for tensor in block]
    return torch.cat(pairs, dim=1).float()


def solve_last_layer(inner_VE: Tensor, wanted_VW: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest weight, and the bias, with which a linear layer maps ``inner_VE`` to ``wanted_VW``.

    Exact where the rows of ``inner_VE`` are independent, which takes V <= E. Returns (W, E) and (W,), in fp32.
    The bias is the mean row, so that the weight holds only what tells the virtual tokens apart.
    """
    bias_W = wanted_VW.mean(dim=0)
    inverse_EV = torch.linalg.pinv(inner_VE.double()).float()
    return (inverse_EV @ (wanted_VW - bias_W)).T.contiguous(), bias_W
