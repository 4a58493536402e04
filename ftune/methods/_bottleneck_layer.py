"""The bottleneck adapter as a module, and how it is put behind a projection; imported by the verbs only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BottleneckLayer", "attach", "bottlenecks", "disabled"]

ATTRIBUTE = "bottleneck"
"""Name of the submodule that a projection gets; its parameters are named after the projection's."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckLayer(nn.Module):
    """``h + W_up f(W_down h)``, the identity at the start because ``W_up`` is zero.

    Args:
        hidden: Width of what it reads and writes.
        size: Width in between.
        activation: ``f``: gelu, relu, silu or tanh.
        dropout: Share of ``f``'s outputs that is dropped in training.
        generator: Draws ``W_down`` from U(-1/sqrt(hidden), 1/sqrt(hidden)), on the CPU.
    """

    def __init__(self, hidden: int, size: int, activation: str, dropout: float, generator: torch.Generator) -> None:
        super().__init__()
        self.enabled = True
        self.activation = _ACTIVATIONS[activation]
        self.down = nn.Linear(hidden, size)
        self.up = nn.Linear(size, hidden)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.down.weight.uniform_(-(hidden**-0.5), hidden**-0.5, generator=generator)
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """(B, T, D) in any float dtype; the result has the same shape and dtype.

        Under autocast the products run in its dtype; without it, in the fp32 of the adapter's own weights.
        """
        if not self.enabled:
            return hidden_BTD
        autocast = torch.is_autocast_enabled(hidden_BTD.device.type)
        input_BTD = hidden_BTD if autocast else hidden_BTD.to(self.down.weight.dtype)
        update_BTD: Tensor = self.up(self.dropout(self.activation(self.down(input_BTD))))
        return hidden_BTD + update_BTD.to(hidden_BTD.dtype)


def _apply(projection: nn.Module, _: Any, output: Tensor) -> Tensor:
    # Finds the adapter through the module it is called for: a deep copy's hook must not run the original's.
    return cast("Tensor", getattr(projection, ATTRIBUTE)(output))


def attach(projection: nn.Module, layer: BottleneckLayer) -> None:
    """Run ``layer`` on what ``projection`` puts out.

    A hook, not a wrapper: the base keeps its parameter names, and the hook runs wherever the projection does, in a
    block that is recomputed in the backward pass too. The adapter is a submodule of the projection, so that
    ``named_parameters``, ``state_dict``, ``to`` and DDP find it.
    """
    projection.add_module(ATTRIBUTE, layer)
    projection.register_forward_hook(_apply)


def bottlenecks(model: nn.Module) -> Iterator[tuple[str, BottleneckLayer]]:
    """Each adapter of a model, with the name of the projection it stands behind."""
    for name, module in model.named_modules():
        if isinstance(module, BottleneckLayer):
            yield name.removesuffix("." + ATTRIBUTE), module


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """A context in which every adapter passes on what it gets, untouched."""
    found = [(adapter, adapter.enabled) for _, adapter in bottlenecks(model)]
    try:
        for adapter, _ in found:
            adapter.enabled = False
        yield
    finally:
        for adapter, enabled in found:
            adapter.enabled = enabled
