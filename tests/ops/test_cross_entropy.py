"""Head and cross-entropy in chunks equal the plain ones, and hold no more than a chunk of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ftune.ops.cross_entropy import (
    _log_softmax,
    _log_softmax_by_rows,
    chunk_size,
    chunked_cross_entropy,
    linear_cross_entropy,
)

N, D, V = 37, 12, 50


def inputs(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    bias_V = torch.randn(V, generator=generator, dtype=dtype).requires_grad_() if bias else None
    return hidden, weight, bias_V, torch.randint(V, (N,), generator=generator)


def plain(hidden: Any, weight: Any, bias: Any, targets: Any, scale: float, softcap: float | None) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 100])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.25, None), (True, 2.0, 3.0)])
def test_loss_and_gradients_are_those_of_the_plain_path(
    bias: bool, scale: float, softcap: float | None, chunk: int
) -> None:
    hidden, weight, bias_V, targets = inputs(bias, torch.float32)
    given = [x for x in (hidden, weight, bias_V) if x is not None]
    expected = plain(hidden, weight, bias_V, targets, scale, softcap)
    actual = linear_cross_entropy(hidden, weight, targets, bias_V, scale=scale, softcap=softcap, chunk=chunk)
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for mine, theirs in zip(
        torch.autograd.grad(3 * actual, given), torch.autograd.grad(3 * expected, given), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_a_tied_one_gets_both() -> None:
    hidden, weight, _, targets = inputs(False, torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is None
    embedding = weight.clone().requires_grad_()
    ids = torch.arange(N) % V
    grads = []
    for loss in (
        linear_cross_entropy(embedding[ids], embedding, targets),
        plain(embedding[ids], embedding, None, targets, 1.0, None),
    ):
        grads.append(torch.autograd.grad(loss, embedding)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_any_head_with_an_adapter_on_it() -> None:
    hidden, weight, _, targets = inputs(False, torch.float32)
    adapter = torch.nn.Sequential(torch.nn.Linear(D, 3), torch.nn.Linear(3, V))

    def head(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = x @ weight.T + adapter(x)
        return logits

    given = [hidden, weight, *adapter.parameters()]
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    actual = chunked_cross_entropy(head, hidden, targets, V, chunk=8)
    assert float(actual.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(actual, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_the_largest_tensor_is_a_chunk_of_logits_whatever_the_vocabulary() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
            return out

    for vocab in (4_000, 32_000):
        hidden = torch.randn(4096, 8, requires_grad=True)
        weight = torch.randn(vocab, 8)
        targets = torch.randint(vocab, (4096,))
        with Largest() as seen:
            linear_cross_entropy(hidden, weight, targets).backward()  # type: ignore[no-untyped-call]
        assert seen.bytes <= chunk_size(vocab) * vocab * 4 <= 32 * 2**20


def test_an_evaluation_computes_no_gradient_of_a_trained_head() -> None:
    hidden, weight, bias_V, targets = inputs(True, torch.float32)
    given = (hidden.detach(), weight, targets, bias_V)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss = linear_cross_entropy(*given)
    assert counter.get_total_flops() == 2 * N * V * D
    assert float(loss) == float(linear_cross_entropy(*given).detach())


@pytest.mark.parametrize("way", [_log_softmax, _log_softmax_by_rows])
def test_logits_are_overwritten(way: Any) -> None:
    logits = torch.randn(130, 8)
    expected = torch.log_softmax(logits, dim=-1)
    found = way(logits)
    assert found is logits
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("positions", [1, 15, 16, 33, 170])
def test_on_the_cpu_products_in_bf16_have_few_shapes(positions: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(positions, 8).bfloat16().requires_grad_()
    weight, targets = torch.randn(50, 8), torch.arange(positions) % 50
    rows: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket is torch.ops.aten.mm:
                rows.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    with Watch():
        loss = linear_cross_entropy(hidden, weight, targets, chunk=48)
    assert rows
    assert all(each % 16 == 0 for each in rows)
    (grad,) = torch.autograd.grad(loss, hidden)
    wide = hidden.detach().float().requires_grad_()
    expected = F.cross_entropy(wide @ weight.bfloat16().float().T, targets, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    torch.testing.assert_close(grad.float(), torch.autograd.grad(expected, wide)[0], rtol=0.1, atol=0.05)
