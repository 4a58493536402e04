"""A smaller step from the base: every weight that a run changed at ``W0 + s (W - W0)``, with W0 the base's.

A layer's output is linear in its weight, so a layer with an adapter computes so too where its output is interpolated
between what it gives without the adapter and with it: no method needs a form of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ftune.models.quantization import dequantized, is_4bit

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["base_weights", "interpolated", "scale_adapter"]


def interpolated(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    """``base + scale * (tuned - base)`` in fp32."""
    import torch

    return torch.lerp(base.detach().float(), tuned.detach().float(), scale)


def scale_adapter(model: nn.Module, scale: float) -> None:
    """Let a PEFT model compute as with scaled changes; what it trained whole (embedding, norms) is changed itself.

    Folding the adapter in gives W as before: whoever merges interpolates (``base_weights``).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    def between(layer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor:
        plain = layer.get_base_layer()(*arguments, **keywords)
        return cast("Tensor", plain.to(output.dtype).lerp(output, scale))

    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.register_forward_hook(between, with_kwargs=True)
        elif isinstance(module, ModulesToSaveWrapper):
            trained, before = cast(Any, module).modules_to_save["default"], cast(Any, module).original_module
            for name, parameter in trained.named_parameters():
                if id(parameter) not in done:  # a tied head is the embedding
                    done.add(id(parameter))
                    parameter.data.copy_(interpolated(before.get_parameter(name), parameter, scale))


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of every layer of the base that has an adapter, in fp32 copies on the host, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[str, Tensor] = {}
    for name, module in cast(Any, model).get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            layer = cast("nn.Module", module.get_base_layer())
            for leaf, parameter in layer.named_parameters():
                weight = dequantized(parameter) if leaf == "weight" and is_4bit(layer) else parameter
                found[f"{name}.{leaf}"] = weight.detach().float().cpu().clone()
    return found
