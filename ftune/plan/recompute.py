"""Which blocks are run a second time in the backward pass instead of keeping their activations.

A recomputed block keeps its input alone (arXiv:1604.06174) and costs one more forward pass. Recomputed are the
first blocks of those that keep anything: the backward pass reaches them last, when what the other blocks kept is
free again, so no recomputation adds to the peak at the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Recomputed", "blocks_of", "choose_blocks", "enable_checkpointing", "is_random", "written"]


@dataclass(frozen=True)
class Recomputed:
    """How many of the model's blocks are recomputed, and why so many."""

    blocks: int
    of: int
    why: str


def choose_blocks(
    asked: bool | int | Literal["auto"], of: int, *, needed: Callable[[int], int], budget: int, recomputable: bool
) -> Recomputed:
    """Decide how many blocks are recomputed.

    Args:
        asked: ``training.gradient_checkpointing``: none, all, a number, or ``auto``: none where that fits, else
            the fewest that fit, else all.
        of: Blocks of the model.
        needed: Predicted peak in bytes when so many blocks are recomputed; it falls with their number.
        budget: Bytes that the run may take.
        recomputable: Whether the method bears it.

    Raises:
        ModelError: The recipe asks for more blocks than there are.
    """
    if asked != "auto":
        blocks = (of if asked else 0) if isinstance(asked, bool) else asked
        if blocks > of:
            raise ModelError(
                f"training.gradient_checkpointing: {blocks}, and the model has {of} blocks",
                help="`true` recomputes all of them",
            )
        return Recomputed(blocks, of, "as asked for")
    if not recomputable:
        return Recomputed(0, of, "the method cannot")
    if needed(0) <= budget:
        return Recomputed(0, of, "the run fits without")
    if needed(of) > budget:
        return Recomputed(of, of, "all, and the run may still not fit")
    fewest, enough = 1, of
    while fewest < enough:
        middle = (fewest + enough) // 2
        fewest, enough = (fewest, middle) if needed(middle) <= budget else (middle + 1, enough)
    return Recomputed(enough, of, "the fewest that fit")


def written(recomputed: Recomputed) -> bool | int:
    """What to write for ``training.gradient_checkpointing`` so that it means the same on any machine."""
    return recomputed.blocks if 0 < recomputed.blocks < recomputed.of else recomputed.blocks > 0


def enable_checkpointing(model: Any, blocks: int | None = None) -> None:
    """Recompute blocks in the backward pass, without the reentrant form (exact, and needs no input grads).

    Args:
        model: A transformers model, adapted or not.
        blocks: How many, counted from the first that trains anything; None: all. A model whose blocks cannot be
            told apart recomputes all.
    """
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # its name in older versions of transformers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if blocks is not None:
        layers = blocks_of(model)
        first = _first_with_graph(model, layers)
        for index, layer in enumerate(layers):
            layer.gradient_checkpointing = first <= index < first + blocks


def blocks_of(model: nn.Module) -> list[Any]:
    """The model's blocks, from the first to the last; none where transformers does not tell them apart."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _first_with_graph(model: nn.Module, layers: list[Any]) -> int:
    """The first block of which autograd keeps anything: 0 where something outside the blocks trains."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in model.parameters()):
        return 0
    return next((i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), 0)


def is_random(model: nn.Module) -> bool:
    """Whether anything in the model's forward pass is drawn while it trains: dropout, of attention too, or noise."""
    from torch import nn

    config = getattr(model, "config", None)
    return _has_chance(config.to_dict() if config is not None else {}) or any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules()
    )


def _has_chance(settings: dict[str, Any]) -> bool:
    """Whether a configuration, or one in it, drops something or adds noise, but for heads that no causal model has."""
    return any(
        _has_chance(value)
        if isinstance(value, dict)
        else isinstance(value, float)
        and value > 0
        and any(word in name for word in ("drop", "jitter", "noise"))
        and not name.startswith(("summary_", "classifier"))
        for name, value in settings.items()
    )
