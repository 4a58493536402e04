"""A set of kernels is in force where it is put, for the backward pass of what began under it, and nowhere else."""

from __future__ import annotations

import threading

import pytest
import torch

from ftune.ops.eager import EAGER, Kernels
from ftune.ops.kernels import current, plain, using
from ftune.ops.linear import Adapted, low_rank_linears
from ftune.ops.recompute import gated, rms_norm
from ftune.ops.rotary import rotate


def counting() -> tuple[Kernels, dict[str, int]]:
    calls = dict.fromkeys(Kernels.__dataclass_fields__, 0)

    def counted(name: str) -> object:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return getattr(EAGER, name)(*arguments)

        return call

    return Kernels(*(counted(name) for name in calls)), calls  # type: ignore[arg-type]


def test_a_set_is_in_force_in_every_thread_until_its_block_ends() -> None:
    mine, _ = counting()
    seen = []

    def fails() -> None:
        with using(mine):
            thread = threading.Thread(target=lambda: seen.append(current()))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [mine]
    assert current() is plain()


def test_what_began_under_a_set_ends_with_it() -> None:
    mine, calls = counting()
    x, gain, a, b = (torch.randn(*shape, requires_grad=True) for shape in ((6, 8), (8,), (2, 8), (8, 2)))
    weight = torch.randn(8, 8)
    with using(mine):
        layers = [Adapted(weight, None, a, b, 1.0)]
        (normed,) = low_rank_linears(rms_norm(x, gain, 1e-5), layers)
        (out,) = low_rank_linears(gated(normed, normed, "silu"), layers)
        heads, cos, sin = out.view(1, 1, 6, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
        query, key = rotate(heads, heads, cos, sin)
    (query + key).sum().backward()  # type: ignore[no-untyped-call]
    assert calls == {"norm": 1, "norm_again": 1, "norm_backward": 1, "gate": 2, "gate_backward": 1, "rotate": 4}
    rms_norm(x, gain, 1e-5)
    assert calls["norm"] == 1
