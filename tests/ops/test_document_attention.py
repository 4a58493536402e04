"""Attention per document equals sdpa on each document alone, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ftune.ops.document_attention import BLOCK, LONG, document_attention

# One block of queries, several, an odd last one; the fused kernel between two of them; documents of one token.
BORDERS = [(0, BLOCK), (0, 1, 2, 40), (0, 2 * BLOCK, 4 * BLOCK + 1, 7 * BLOCK), (0, 300, 301 + LONG, 1400)]


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_each_document_alone(
    borders: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    torch.manual_seed(0)
    length = borders[-1]
    made = [torch.randn(h, length, 16).to(dtype) for h in (heads[0], heads[1], heads[1])]
    mine = [x.clone().requires_grad_() for x in made]
    theirs = [x.float().requires_grad_() for x in made]
    weights = torch.randn(length, heads[0], 16)
    out = document_attention(mine[0], mine[1], mine[2], borders, scale=0.3)
    parts = [
        F.scaled_dot_product_attention(*(x[None, :, a:b] for x in theirs), is_causal=True, scale=0.3, enable_gqa=True)
        for a, b in zip(borders, borders[1:], strict=False)
    ]
    expected = torch.cat(parts, dim=2)[0].transpose(0, 1)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() <= bound * expected.abs().max()
    actual = torch.autograd.grad((out.float() * weights).sum(), mine)
    for grad, reference in zip(actual, torch.autograd.grad((expected * weights).sum(), theirs), strict=True):
        assert (grad.float() - reference).norm() <= bound * reference.norm()


def test_autocast_rounds_no_score() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 100, 16).bfloat16() * 3 for _ in range(3))
    alone = document_attention(query, key, value, (0, 100))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(document_attention(query, key, value, (0, 100)), alone)


def test_products_in_bf16_have_few_shapes() -> None:
    shapes: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.bmm and args[0].dtype == torch.bfloat16:
                shapes.update((*args[0].shape[1:], args[1].shape[2]))
            return func(*args, **(kwargs or {}))

    torch.manual_seed(0)
    for length in range(1, 60):
        query, key, value = (torch.randn(heads, 96, 32).bfloat16().requires_grad_() for heads in (4, 2, 2))
        with Watch():
            document_attention(query, key, value, (0, length, 96)).float().sum().backward()
    assert shapes
    assert all(each % 16 == 0 for each in shapes)
