"""Rotary positions: queries and keys turned in one pass each, forwards and backwards.

Of the usual form in torch's operations autograd makes a dozen kernels for each, and as many again backwards.

Source: Su et al., RoFormer (arXiv:2104.09864), sec. 3.4.2, with GPT-NeoX's halves in the place of neighbouring pairs.

Shape suffixes: B rows, H query heads, K key heads, L tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftune.ops.eager import Kernels
from ftune.ops.kernels import current

__all__ = ["rotate"]


def rotate(query_BHLD: Tensor, key_BKLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """``x * cos + [-x_high, x_low] * sin`` of queries and of keys.

    Args:
        query_BHLD: Queries.
        key_BKLD: Keys.
        cos_BLD: Cosines, whose gradient nobody wants; of one row for all rows, or of each.
        sin_BLD: Sines, the same.

    Returns:
        Queries and keys, in the dtype that theirs and the cosines' promote to.
    """
    query, key = _Rotate.apply(query_BHLD, key_BKLD, cos_BLD, sin_BLD, current())  # type: ignore[no-untyped-call]
    return query, key


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHLD: Tensor, key_BKLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos_BLD, sin_BLD)
        ctx.kernels, ctx.dtypes = kernels, (query_BHLD.dtype, key_BKLD.dtype)
        return (
            kernels.rotate(query_BHLD, cos_BLD, sin_BLD, False),
            kernels.rotate(key_BKLD, cos_BLD, sin_BLD, False),
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        cos_BLD, sin_BLD = ctx.saved_tensors
        turned = [
            ctx.kernels.rotate(grad, cos_BLD, sin_BLD, True).to(dtype) if wanted else None
            for grad, dtype, wanted in zip(grads, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        ]
        return *turned, None, None, None
