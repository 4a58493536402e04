"""Did it move? Every parameter meant to train must change, or the run fails."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor, nn

from ftune.errors import RunFailed
from ftune.ops.sharded import whole

__all__ = ["MoveWatch"]

# LoRA's A has no gradient while B is zero, and a vanishing gradient may take an update to show in fp32.
PATIENCE = 3
# Elements of a bf16 weight that must be expected to have moved, rounded at random, before none is suspicious.
EXPECTED_MOVES = 30


class MoveWatch:
    """Hold that each trained parameter gets a gradient and changes within the first updates.

    Attributes:
        idle: What to tell of parameters that learn nothing on this base, where the others move; None where all do.

    Args:
        model: The adapted model, before its first update.
        keeps_gradients: Whether gradients are still there after the update; False where each parameter is
            updated, and its gradient freed, during the backward pass.
        at_rest: Parameters that the method holds still, which are not watched.
        of_base: Whether the base's own weights train. One whose gradient is zero may move later: a router whose choices
            were clear.
        only: The parameters that had not moved when the run was interrupted; None: all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keeps_gradients: bool = True,
        at_rest: frozenset[str] = frozenset(),
        of_base: bool = False,
        alone: bool = True,
        only: Collection[str] | None = None,
    ) -> None:
        self._keeps_gradients, self._of_base, self._alone = keeps_gradients, of_base, alone
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise RunFailed("the method left nothing to train: no parameter requires grad")
        watched = trained.keys() - at_rest if only is None else trained.keys() & set(only) - at_rest
        self._waiting = _checksums({name: p for name, p in trained.items() if name in watched})
        self._all = only is None
        self._trained = len(self._waiting)
        self._updates = 0
        self.idle: str | None = None
        self._rates = 0.0

    @property
    def resting(self) -> list[str]:
        """The parameters that have not moved yet."""
        return list(self._waiting)

    def after_update(self, model: nn.Module, *, last: bool, learning_rate: float, at_peak: bool = True) -> None:
        """Look at the parameters after an update, while their gradients are still there.

        Args:
            model: The adapted model.
            last: Whether the run ends with this update.
            learning_rate: Of this update, the lowest of all groups: about what AdamW moves an element by.
            at_peak: Whether the warm-up is over: before, an update of a large weight may be less than its last bit.

        Raises:
            RunFailed: A parameter is outside the graph, or did not move in ``PATIENCE`` updates that should show.
        """
        if not self._waiting:
            return
        self._updates += 1
        self._rates += learning_rate
        parameters = dict(model.named_parameters())
        outside = [name for name in self._waiting if parameters[name].grad is None] if self._keeps_gradients else []
        if outside and self._alone and 2 * len(outside) < self._trained:
            self.idle = f"{_some(outside)} got no gradient: the model does not use them here, and they stay as they are"
            if not self._of_base:
                self.idle += f"; {_without(outside, [name for name in parameters if parameters[name].requires_grad])}"
            self._waiting = {name: before for name, before in self._waiting.items() if name not in outside}
        elif outside:
            raise RunFailed(
                f"{_some(outside)} got no gradient: trained in name only",
                help="the model does not use them; narrow method.target_modules",
            )
        now = _checksums({name: parameters[name] for name in self._waiting})
        self._waiting = {name: before for name, before in self._waiting.items() if now[name] == before}
        resting = []
        if at_peak and self._updates >= PATIENCE:
            resting = [name for name in self._waiting if self._should_show(parameters[name], learning_rate)]
        still = [name for name in resting if _is_zero(parameters[name].grad)]
        if still and not self._of_base and not self.idle and 2 * len(still) < self._trained:
            self.idle = (
                f"{_some(still)} get gradients of zero: the base multiplies by zero what comes of them, so they learn "
                f"nothing; {_without(still, [name for name in parameters if parameters[name].requires_grad])}"
            )
        if still and (self._of_base or self.idle):
            resting = [name for name in resting if name not in still]
        if last and self._all and len(self._waiting) == self._trained:
            resting = list(self._waiting)
        if resting:
            raise RunFailed(
                f"{_some(resting)} did not move in {self._updates} update{'s' * (self._updates > 1)}",
                help="raise optimizer.learning_rate, or check that the method suits this model",
            )

    @torch.no_grad()
    def _should_show(self, parameter: Tensor, learning_rate: float) -> bool:
        """Whether an update of this size changes the last bit of the parameter's smallest element."""
        bit = float(whole(parameter).abs().min()) * torch.finfo(parameter.dtype).eps
        if parameter.dtype == torch.float32:
            return learning_rate >= bit
        # Rounded at random, an element moves with the probability of the update over the bit.
        return self._rates * parameter.numel() >= EXPECTED_MOVES * bit


@torch.no_grad()
def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(whole(gradient).any())


# The adapted layer in the name of PEFT's parameter.
_LAYER = re.compile(r"\.([^.]+(?:\.\d+)?)\.(?:lora|ia3|vera|fourierft)_")


def _without(still: list[str], trained: list[str]) -> str:
    """What to write so that the layers with these parameters are not adapted."""

    def layers(names: list[str]) -> set[str]:
        return {found[1] for name in names if (found := _LAYER.search(name))}

    left = sorted(layers(trained) - layers(still))
    if not left:
        return "narrow method.target_modules"
    return f"to leave them out: `method.target_modules: [{', '.join(left)}]`"


def _some(names: list[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more parameters"


PIECE = 2**20
"""Elements that are summed at once: as 64-bit integers a whole embedding would take twice its memory."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def _checksums(parameters: dict[str, Tensor]) -> dict[str, int]:
    """Of each parameter a sum of its bits, each element's times an odd number of its own, modulo 2^64."""
    # Asked for together, by device: every question waits for all that a GPU was given to do.
    sums: dict[torch.device, dict[str, Tensor]] = {}
    factors: dict[torch.device, Tensor] = {}
    for name, parameter in parameters.items():
        # Not of a part: a process may have rows of an embedding that no token uses.
        bits = whole(parameter).contiguous().view(_INTEGERS[parameter.element_size()]).flatten()
        device, length = bits.device, min(PIECE, len(bits))
        if device not in factors or len(factors[device]) < length:
            factors[device] = torch.arange(length, device=device).mul_(0x1E3779B97F4A7C15).bitwise_or_(1)
        total = torch.zeros((), dtype=torch.int64, device=device)
        for piece in torch.split(bits, PIECE):
            total = total * 31 + (piece * factors[device][: len(piece)]).sum()
        sums.setdefault(device, {})[name] = total
    found = {
        name: total
        for of_device in sums.values()
        for name, total in zip(of_device, torch.stack(list(of_device.values())).tolist(), strict=True)
    }
    return {name: found[name] for name in parameters}
