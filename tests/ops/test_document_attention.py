"""Attention per document equals sdpa on each document alone, forwards and backwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ftune.ops.document_attention import BLOCK, LONG, LONG_IN_TILES, document_attention

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


@pytest.mark.parametrize("amx", [False, True])
def test_short_documents_need_no_product_in_16_bits_long_ones_the_fused_kernel(
    amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if "flash" in name or ("mm" in name and args[0].dtype == torch.bfloat16):
                called.append(name)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    query, key, value = (torch.randn(heads, LONG, 16).bfloat16().requires_grad_() for heads in (4, 2, 2))
    for borders in [(0, LONG_IN_TILES, 2 * LONG_IN_TILES), (0, LONG)]:
        called.clear()
        rows = (x[:, : borders[-1]] for x in (query, key, value))
        with Watch():
            document_attention(*rows, borders).float().sum().backward()
        assert len(called) == (2 if amx and borders[1] > LONG_IN_TILES else 0)
