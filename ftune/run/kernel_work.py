"""How often a micro-batch calls the functions of norms and gates, and on what."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ftune.ops.kernels import EAGER, Activation, using
from ftune.plan.resolve import Plan
from ftune.run.head import autocast

__all__ = ["Work", "find_work", "portions"]

PROBE_TOKENS = 8

# Of the seven projections of a block five read a norm and one reads a gate; each asks for its input again.
_READ_NORMS, _READ_GATES = 5 / 7, 1 / 7


@dataclass(frozen=True)
class _Norm:
    """What decides the code of a norm; ``rows`` of ``width`` elements a token: more than one where heads are normed."""

    rows: int
    width: int
    dtype: torch.dtype
    gain_dtype: torch.dtype
    eps: float
    offset: bool
    trained: bool


@dataclass(frozen=True)
class _Gate:
    """What decides the code of a gate."""

    width: int
    dtype: torch.dtype
    activation: Activation


@dataclass(frozen=True)
class Work:
    """One function on arguments as the run has them, and how often a micro-batch calls it."""

    kernel: str
    arguments: tuple[Any, ...]
    times: float


def find_work(
    model: nn.Module, lean: dict[str, Any], tokens: int, dtype: torch.dtype, device: torch.device
) -> list[Work]:
    """The calls of norms and gates in a micro-batch, seen in a forward pass of a few tokens.

    The backward pass is reckoned: one call for each of the forward pass, and one more that makes an output again for
    each projection that reads it and trains. Recomputed blocks would add to that; they are not counted.

    Args:
        model: The lean model; left in training mode if it was.
        lean: What was replaced in it (``ftune.plan.lean.make_lean``).
        tokens: In a micro-batch.
        dtype: What the model computes in.
        device: Where it is.
    """
    seen = _watch(model, dtype, device)
    gates = sum(isinstance(call, _Gate) for call in seen)
    # Where projections are replaced whole, linear layers are parts of them.
    readers = lean.get("low_rank", lean.get("linears", 0))
    # Projections read norms of the residual stream, as the first one is; attention reads those of heads.
    widths = [call.width for call in seen if isinstance(call, _Norm)]
    read = widths.count(widths[0]) if widths else 0
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, of: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=of)

    work = []
    for call in dict.fromkeys(seen):
        times = seen.count(call)
        if isinstance(call, _Norm):
            x = random(tokens * call.rows, call.width, of=call.dtype)
            gain = random(call.width, of=call.gain_dtype) * 0.1 + 1
            out, rstd = EAGER.norm(x, gain, call.eps, call.offset)
            again = readers * _READ_NORMS / read if call.width == widths[0] else 0.0
            backward = (random(*out.shape, of=out.dtype), x, rstd, gain, call.offset, True, call.trained)
            work += [
                Work("norm", (x, gain, call.eps, call.offset), times),
                Work("norm_again", (x, rstd, gain, call.offset), times * again),
                Work("norm_backward", backward, times),
            ]
        else:
            gate, up, grad = (random(tokens, call.width, of=call.dtype) for _ in range(3))
            again = readers * _READ_GATES / gates
            work += [
                Work("gate", (gate, up, call.activation), times * (1 + again)),
                Work("gate_backward", (grad, gate, up, call.activation, True, True), times),
            ]
    return [each for each in work if each.times]


@torch.no_grad()
def _watch(model: nn.Module, dtype: torch.dtype, device: torch.device) -> list[_Norm | _Gate]:
    """Every call of a norm or a gate in a forward pass."""
    seen: list[_Norm | _Gate] = []
    stream: list[int] = []

    def norm(x: Tensor, gain: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
        # The first one is of the residual stream: a row a position. Virtual tokens have positions too.
        stream.append(x.shape[:-1].numel())
        rows = stream[-1] // stream[0]
        seen.append(_Norm(rows, x.shape[-1], x.dtype, gain.dtype, eps, offset, gain.requires_grad))
        return EAGER.norm(x, gain, eps, offset)

    def gate(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        seen.append(_Gate(gate.shape[-1], gate.dtype, activation))
        return EAGER.gate(gate, up, activation)

    watching = replace(EAGER, norm=norm, gate=gate)
    was_training = model.training
    model.eval()
    try:
        with using(watching), autocast(dtype, device.type):
            model(input_ids=torch.arange(PROBE_TOKENS, device=device)[None], use_cache=False)
    finally:
        model.train(was_training)
    return seen


def portions(plan: Plan, flat: bool, start: int) -> tuple[int, int]:
    """Tokens in a micro-batch of one process on average, without padding, and how many of them are left."""
    each = sum(plan.row_lengths) / plan.steps_per_epoch / plan.world_size
    micro_batches = plan.recipe.training.accumulation
    if flat:
        micro_batches = math.ceil(each / plan.micro_batch_tokens)
    # With one row the compiler would make code for one row alone.
    return max(2, round(each / micro_batches)), (plan.total_steps - start) * micro_batches
