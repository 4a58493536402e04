"""A model's output head where it is a plain linear layer, whatever wraps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

__all__ = ["plain_head"]


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The linear layer that a model's head is, or the copy of it that PEFT trains in its place; None: something else.

    PEFT's copy of a tied head has the right weight, and ``in_features`` and ``out_features`` the wrong way round.
    """
    import torch

    head = cast(Any, model).get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, torch.nn.ModuleDict):
        active = [] if head.disable_adapters else head.active_adapters
        head = copies[active[0]] if active else head.original_module
    return head if type(head) is torch.nn.Linear else None
