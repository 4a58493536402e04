"""Merging one layer at a time: a base model without weights, which are put in where and while they are needed.

PEFT itself merges each layer, so that what comes out is what merging the whole model in memory gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ftune.models.quantization import dequantized

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftune.methods.quantization import Quantization

__all__ = ["as_quantized", "hollow", "is_adapted", "merge_layer", "outputs"]


def hollow(model: nn.Module) -> nn.Module:
    """Give every parameter of a model on the meta device one stored fp32 zero, seen in the parameter's shape.

    Unlike on the meta device, PEFT puts adapters beside such weights as beside real ones. Whoever writes into one
    by mistake gets an error: its elements share their memory. Tied parameters stay tied.
    """
    import torch

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                zero = torch.zeros((), dtype=torch.float32, device="cpu")
                made[id(parameter)] = torch.nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
            setattr(module, name, made[id(parameter)])
    return model


def merge_layer(model: nn.Module, name: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold a PEFT adapter into the parameters of one module of its base.

    Args:
        model: From ``load`` over a hollow base; it is the same afterwards.
        name: The module's name in the base model.
        weights: The parameters that the module itself has, by name (``weight``, ``bias``), fp32; not changed.

    Returns:
        Them merged; as they were where the module is not adapted.
    """
    import torch
    from peft.utils import ModulesToSaveWrapper

    layer = cast(Any, _find(model, name))
    if isinstance(layer, ModulesToSaveWrapper):
        trained = cast(Any, layer).modules_to_save["default"]
        return {leaf: trained.get_parameter(leaf).detach().float() for leaf in weights}
    if not is_adapted(model, name):
        return weights
    with _filled(layer.get_base_layer(), weights) as base, torch.no_grad():
        try:
            layer.merge(safe_merge=True)
            return {leaf: base.get_parameter(leaf).data for leaf in weights}
        finally:
            layer.merged_adapters.clear()


def is_adapted(model: nn.Module, name: str) -> bool:
    """Whether a module of the base has an adapter beside its weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(_find(model, name), BaseTunerLayer)


def outputs(
    model: nn.Module, name: str, weights: dict[str, Tensor], merged: list[dict[str, Tensor]], inputs_BN: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What an adapted layer computes: with its adapter, without it, and plain with other weights; each (B, M).

    Args:
        model: From ``load`` over a hollow base.
        name: The layer's name in the base model.
        weights: Its parameters, fp32.
        merged: Parameters to compute with instead of these and the adapter.
        inputs_BN: Rows of the layer's width, fp32.
    """
    import torch

    layer = cast(Any, _find(model, name))
    base = layer.get_base_layer()
    with torch.no_grad():
        with _filled(base, weights):
            tuned, plain = layer(inputs_BN), base(inputs_BN)
        instead = []
        for other in merged:
            with _filled(base, other):
                instead.append(base(inputs_BN))
    return tuned, plain, instead


def as_quantized(weight: Tensor, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a weight is once it was 4-bit: quantized as for training, and dequantized to fp32.

    Args:
        weight: (out, in), in the dtype it is quantized from.
        quantization: The recipe's block.
        dtype: What the model computes in.
        device: Where the model was quantized; codes may differ by device where two are equally near.
    """
    from bitsandbytes.nn import Params4bit

    config = quantization.config(dtype)
    packed = Params4bit(
        weight.contiguous(),
        requires_grad=False,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    )
    return dequantized(packed.to(device)).cpu()


def _find(model: nn.Module, name: str) -> nn.Module:
    from peft import PeftModel

    base = cast("nn.Module", model.base_model.model if isinstance(model, PeftModel) else model)
    return base.get_submodule(name)


@contextmanager
def _filled(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
    """A module with these parameters for as long as the block lasts."""
    before = {leaf: module.get_parameter(leaf).data for leaf in weights}
    try:
        for leaf, tensor in weights.items():
            # A copy: PEFT scales some parameters in place.
            module.get_parameter(leaf).data = tensor.clone()
        yield module
    finally:
        for leaf, tensor in before.items():
            module.get_parameter(leaf).data = tensor
