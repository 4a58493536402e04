"""4-bit linear layers of bitsandbytes: told apart, and turned back into plain ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = ["dequantize", "dequantized", "is_4bit"]


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' 4-bit linear layer (PEFT's wrapper around one is not)."""
    # By name: importing bitsandbytes to ask would cost seconds in runs that never use it.
    return any(
        cls.__name__ == "Linear4bit" and cls.__module__.startswith("bitsandbytes.") for cls in type(module).__mro__
    )


def dequantized(weight: Any) -> Tensor:
    """What a quantized ``Params4bit`` multiplies with, in fp32."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    # The exact product of codes and scales; by itself bitsandbytes rounds it to the dtype before quantization.
    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return cast("Tensor", dequantize_4bit(weight.data, state))


def dequantize(model: nn.Module) -> nn.Module:
    """Replace every 4-bit linear layer by a plain one that holds exactly what it multiplied with, in fp32."""
    import torch

    for name, module in list(model.named_modules()):
        if not is_4bit(module):
            continue
        layer = cast(Any, module)
        plain = torch.nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device
        )
        plain.weight.data = dequantized(layer.weight)
        if layer.bias is not None:
            plain.bias.data = layer.bias.data.float()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    whole = cast(Any, model)
    for attribute in ("is_loaded_in_4bit", "is_quantized"):
        if hasattr(whole, attribute):
            setattr(whole, attribute, False)
    whole.hf_quantizer = None
    whole.quantization_method = None
    if getattr(whole.config, "quantization_config", None) is not None:
        del whole.config.quantization_config
    return model
