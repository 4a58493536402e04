"""Where PEFT keeps what AdaLoRA allocates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

__all__ = ["adalora_layers", "allocator_of", "config_of", "ranks_of"]


def config_of(model: nn.Module) -> Any:
    return cast(Any, model).peft_config["default"]


def allocator_of(model: nn.Module) -> Any:
    """PEFT's ``RankAllocator``, which ``adapt`` gives a counter of allocations."""
    return cast(Any, model).base_model.rankallocator


def adalora_layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers by the name of the base model's projection."""
    from peft.tuners.adalora import AdaLoraLayer

    inner = cast(Any, model).base_model.model
    return {name: module for name, module in inner.named_modules() if isinstance(module, AdaLoraLayer)}


def ranks_of(model: nn.Module) -> list[int]:
    """Singular values of each layer that are not zero."""
    import torch

    # All at once: one wait for the device, not one a layer.
    return torch.stack([layer.lora_E["default"].count_nonzero() for layer in adalora_layers(model).values()]).tolist()
