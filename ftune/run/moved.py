"""Did it move? Every parameter meant to train must change, or the run fails."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ftune.errors import RunFailed

__all__ = ["MoveWatch"]

# LoRA's A has no gradient while B is zero, and a vanishing gradient may take an update to show in fp32.
PATIENCE = 3


class MoveWatch:
    """Hold that each trained parameter gets a gradient and changes within the first updates.

    Args:
        model: The adapted model, before its first update.
        keeps_gradients: Whether gradients are still there after the update; False where each parameter is
            updated, and its gradient freed, during the backward pass.
        at_rest: Parameters that the method holds still, which are not watched.
    """

    def __init__(
        self, model: nn.Module, *, keeps_gradients: bool = True, at_rest: frozenset[str] = frozenset()
    ) -> None:
        self._keeps_gradients = keeps_gradients
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._waiting = {name: _checksum(p) for name, p in trained.items() if name not in at_rest}
        self._trained = len(self._waiting)
        self._updates = 0
        if not trained:
            raise RunFailed("the method left nothing to train: no parameter requires grad")

    @property
    def done(self) -> bool:
        """Whether every parameter has moved."""
        return not self._waiting

    def after_update(self, model: nn.Module, *, last: bool, at_peak: bool = True) -> None:
        """Look at the parameters after an update, while their gradients are still there.

        Args:
            model: The adapted model.
            last: Whether the run ends with this update.
            at_peak: Whether the warm-up is over: before, an update of a large weight may be less than its last bit.

        Raises:
            RunFailed: A parameter is outside the graph, or did not move in ``PATIENCE`` updates.
        """
        if self.done:
            return
        self._updates += 1
        parameters = dict(model.named_parameters())
        outside = [name for name in self._waiting if parameters[name].grad is None]
        if outside and self._keeps_gradients:
            raise RunFailed(
                f"{_some(outside)} got no gradient: trained in name only",
                help="the model does not use them; narrow method.target_modules",
            )
        self._waiting = {
            name: before for name, before in self._waiting.items() if _checksum(parameters[name]) == before
        }
        if (at_peak and self._updates >= PATIENCE) or (last and len(self._waiting) == self._trained):
            resting = list(self._waiting)
        else:
            resting = []
        if resting:
            raise RunFailed(
                f"{_some(resting)} did not move in {self._updates} update{'s' * (self._updates > 1)}",
                help="raise optimizer.learning_rate, or check that the method suits this model",
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more parameters"


def _checksum(parameter: Tensor) -> int:
    """The sum of the parameter's bits, read as integers: any change of any element shows in it."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = parameter.detach().contiguous().view(integers[parameter.element_size()])
    return int(bits.sum(dtype=torch.int64))
