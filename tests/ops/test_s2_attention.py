"""S2-Attn against a dense boolean mask for every head, written down from the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.ops.s2_attention import s2_attention, shifted_heads

BOUND = 1e-5


def dense_mask(heads: int, length: int, group: int, documents: Tensor) -> Tensor:
    """(B, H, L, L): causal, one document, one group; the last half of the heads has its borders half a group off."""
    mask = torch.zeros(documents.shape[0], heads, length, length, dtype=torch.bool)
    for head in range(heads):
        shift = group // 2 if head >= heads // 2 else 0
        for query in range(length):
            for key in range(query + 1):
                if (query + shift) // group == (key + shift) // group:
                    mask[:, head, query, key] = documents[:, query] == documents[:, key]
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over all keys with a mask, in elementary operations: (B, L, H, D)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def states(rows: int, heads: int, kv_heads: int, length: int, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    # Laid out as transformers lays them out: heads inside a token.
    return [
        torch.randn(rows, length, count, dim, generator=generator).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def packed(rows: int, length: int) -> Tensor:
    """Document numbers with borders inside groups and on them, another in every row: (B, L)."""
    places = torch.arange(length)
    return torch.stack([(places + 3 * row) // 7 + (places >= 16).long() for row in range(rows)])


LENGTHS = [1, 3, 4, 5, 8, 11, 12, 16, 20, 23, 32, 37]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (3, 3), (9, 3), (1, 1)])
@pytest.mark.parametrize("documents", ["one", "packed"])
def test_equals_the_dense_definition_with_its_gradients(length: int, heads: int, kv_heads: int, documents: str) -> None:
    rows, group = 2, 8
    of = packed(rows, length) if documents == "packed" else torch.zeros(rows, length)
    inputs = states(rows, heads, kv_heads, length)
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (of[:, :, None] == of[:, None, :])
    mask = seen[:, None] if documents == "packed" else None
    actual = s2_attention(inputs[0], inputs[1], inputs[2], group, mask)
    expected = dense(inputs[0], inputs[1], inputs[2], dense_mask(heads, length, group, of))
    assert (actual - expected).abs().max() <= BOUND
    pull = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad(actual, inputs, pull), torch.autograd.grad(expected, inputs, pull), strict=True
    ):
        assert (mine - theirs).abs().max() <= BOUND


@pytest.mark.parametrize(("heads", "kv_heads", "copied"), [(4, 2, False), (8, 2, False), (9, 3, True), (4, 1, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_are_shared_where_no_key_is_read_from_both_sides(
    heads: int, kv_heads: int, copied: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    sdpa = F.scaled_dot_product_attention

    def watched(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        given.append((key.shape[1] == value.shape[1] == query.shape[1], settings["enable_gqa"]))
        return sdpa(query, key, value, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()[None, None] if masked else None
    s2_attention(*states(1, heads, kv_heads, 20), 8, mask)
    assert set(given) == {(True, False) if copied or masked else (False, True)}


def test_a_row_of_half_a_group_is_plain_causal() -> None:
    query, key, value = states(2, 4, 2, 8)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    assert (s2_attention(query, key, value, 16).transpose(1, 2) - plain).abs().max() <= BOUND


def test_no_token_sees_a_later_one() -> None:
    for length in (16, 20, 23):
        query, key, value = (x.detach() for x in states(1, 4, 4, length))
        before = s2_attention(query, key, value, 8)
        for x in (query, key, value):
            x[:, :, -1] += 100.0
        after = s2_attention(query, key, value, 8)
        assert torch.equal(after[:, :-1], before[:, :-1])
        assert not torch.equal(after[:, -1], before[:, -1])


def test_padding_behind_a_row_changes_nothing_before_it() -> None:
    query, key, value = (x.detach() for x in states(1, 4, 2, 29))
    whole = s2_attention(query, key, value, 8)
    for length in range(1, 29):
        part = s2_attention(query[:, :, :length], key[:, :, :length], value[:, :, :length], 8)
        assert (part - whole[:, :length]).abs().max() <= BOUND


def test_queries_that_may_see_nothing_give_zero_and_finite_gradients() -> None:
    inputs = states(2, 4, 2, 16)
    mask = torch.ones(16, 16, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, 6:] = False  # the second row has six tokens, then padding
    out = s2_attention(inputs[0], inputs[1], inputs[2], 8, mask)
    assert torch.equal(out[1, 12:], torch.zeros_like(out[1, 12:]))
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(out.square().sum(), inputs))


def test_scale_and_dropout_are_used() -> None:
    query, key, value = states(1, 4, 2, 16)
    expected = dense(query, key, value, dense_mask(4, 16, 8, torch.zeros(1, 16)), scale=0.7)
    assert (s2_attention(query, key, value, 8, scale=0.7) - expected).abs().max() <= BOUND
    torch.manual_seed(0)
    dropped = s2_attention(query, key, value, 8, dropout=0.5)
    assert not torch.allclose(dropped, s2_attention(query, key, value, 8))


def test_the_larger_half_of_the_heads_is_shifted() -> None:
    assert [shifted_heads(heads) for heads in (1, 2, 3, 4, 9, 32)] == [1, 1, 2, 2, 5, 16]
