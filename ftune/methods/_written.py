"""Which layers' outputs a model writes into, found by a forward pass of a few tokens.

Some architectures add to what a layer returned in place. A layer that keeps its output for the backward pass must
return a copy there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["COPIES", "mark_written"]

COPIES = "_ftune_copies_output"
"""Attribute of a layer whose output is written into."""


def mark_written(model: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Set ``COPIES`` on those of some layers whose output the model changes in place; returns how many.

    Args:
        model: The model they are in; left in the mode it was in.
        layers: Each returns one tensor.
        dtype: What the model computes in.
    """
    import torch

    from ftune.ops.kernels import TRIAL_TOKENS

    returned: list[tuple[nn.Module, Tensor, int]] = []

    def keep(layer: nn.Module, _: Any, out: Tensor) -> None:
        returned.append((layer, out, out._version))

    weight = cast(Any, model).get_input_embeddings().weight
    ids = torch.arange(TRIAL_TOKENS, device=weight.device)[None] * 7919 % len(weight)
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(weight.device.type, dtype=dtype, enabled=dtype != torch.float32):
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    written = {layer for layer, out, version in returned if out._version != version}
    for layer in written:
        setattr(layer, COPIES, True)
    return len(written)
