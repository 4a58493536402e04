"""Averaging over processes, with the exchange in one process replaced."""

from __future__ import annotations

import pytest
import torch

from ftune.run.engines import base


def test_averages_go_back_where_they_came_from_in_few_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []

    def all_reduce(flat: torch.Tensor) -> None:
        sent.append(flat)
        flat += flat  # the other process has the same

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    monkeypatch.setattr(base, "BUCKET", 10)
    large = torch.arange(12.0).view(3, 4)
    tensors = [torch.ones(3), torch.ones(2, 3).T, large, torch.ones(4, dtype=torch.float64), torch.ones(2, 6).T]
    before = [tensor.clone() for tensor in tensors]
    base.average(tensors, 2)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert [flat.numel() for flat in sent] == [9, 12, 4, 12]
    # no copy of what is larger than a message
    assert sent[1].data_ptr() == large.data_ptr()


def test_a_parameter_that_another_process_alone_used_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    here, both, none, there = (torch.nn.Parameter(torch.zeros(2)) for _ in range(4))
    here.grad, both.grad = torch.ones(2), torch.ones(2)
    others = [torch.tensor([0, 1, 0, 1], dtype=torch.uint8), torch.tensor([0.0, 0.0, 3.0, 3.0, 5.0, 5.0])]

    def all_reduce(here: torch.Tensor, op: object = None) -> None:
        other = others.pop(0)
        here.copy_(torch.maximum(here, other) if here.dtype == torch.uint8 else here + other)

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    base.average_gradients([here, both, none, there], 2, torch.device("cpu"))
    assert [None if p.grad is None else p.grad.tolist() for p in (here, both, none, there)] == [
        [0.5, 0.5],
        [2.0, 2.0],
        None,
        [2.5, 2.5],
    ]
    assert not others
