"""Layers of a loaded model replaced by ones that compute the same and keep less for the backward pass.

A layer is replaced only where a trial on the layer itself shows the same output; what is not recognised stays as it
is. The replacement is a subclass made for the occasion: parameters, names, hooks and files stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftune.ops.recompute import Activation

__all__ = ["lean_base", "lean_low_rank", "with_forward"]

_SUBCLASSES: dict[tuple[type, Callable[..., Any]], type] = {}


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another ``forward(self, ...)``, through a subclass of its own class."""
    cls = type(module)
    key = (cls, forward)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    module.__class__ = _SUBCLASSES[key]


def lean_base(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Replace RMS norms, gated feed-forwards and trained linear layers.

    Args:
        model: The adapted model.
        dtype: What it computes in.

    Returns:
        How many layers of each kind were replaced.
    """
    import torch

    counts = {"norms": 0, "gates": 0, "linears": 0}
    verdicts: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
    head = cast(Any, model).get_output_embeddings()
    key: tuple[Any, ...]
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            key = (type(module), _eps(module))
            if key not in verdicts:
                verdicts[key] = next((f for f in (_plain_norm, _offset_norm) if _same_norm(module, f)), None)
            kind = "norms"
        elif _activation(module) is not None:
            key = (type(module), _activation(module))
            if key not in verdicts:
                verdicts[key] = _gated_forward if _same_gate(module, dtype) else None
            kind = "gates"
        elif type(module) is torch.nn.Linear and module is not head and _casts(module, dtype):
            key, kind = (torch.nn.Linear,), "linears"
            verdicts[key] = _cast_forward
        else:
            continue
        forward = verdicts[key]
        if forward is not None:
            with_forward(module, forward)
            counts[kind] += 1
    return counts


# --- norms -------------------------------------------------------------------------------------------------


def _eps(module: Any) -> float | None:
    return cast("float | None", getattr(module, "variance_epsilon", getattr(module, "eps", None)))


def _plain_norm(self: Any, hidden_states: Tensor) -> Tensor:
    from ftune.ops.recompute import rms_norm

    return rms_norm(hidden_states, self.weight, _eps(self))  # type: ignore[arg-type]


def _offset_norm(self: Any, hidden_states: Tensor) -> Tensor:
    from ftune.ops.recompute import rms_norm

    return rms_norm(hidden_states, self.weight, _eps(self), offset=True)  # type: ignore[arg-type]


def _same_norm(module: nn.Module, forward: Callable[..., Tensor]) -> bool:
    import torch

    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or _eps(module) is None or list(module.parameters()) != [weight]:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        return torch.equal(module(x), forward(module, x))


# --- gated feed-forwards -----------------------------------------------------------------------------------


def _activation(module: Any) -> Activation | None:
    """The activation of a gated feed-forward of the common build, else None."""
    children = dict(module.named_children())
    if not {"gate_proj", "up_proj", "down_proj"} <= children.keys() or not hasattr(module, "act_fn"):
        return None
    name = type(module.act_fn).__name__
    names: dict[str, Activation] = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh"}
    return names.get(name)


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    from ftune.ops.recompute import gated

    activation = _activation(self)
    assert activation is not None
    return cast("Tensor", self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation)))


def _same_gate(module: Any, dtype: torch.dtype) -> bool:
    import torch

    weight = next(module.gate_proj.parameters())
    width = getattr(module.gate_proj, "in_features", None)
    if width is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator).to(weight.device, dtype)
    was_training = module.training
    module.eval()  # no dropout
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return torch.equal(module(x), _gated_forward(module, x))
    finally:
        module.train(was_training)


# --- trained linear layers ---------------------------------------------------------------------------------


def _casts(module: Any, dtype: torch.dtype) -> bool:
    """Whether autocast would cast this layer's trained weight."""
    return bool(module.weight.requires_grad and module.weight.dtype.itemsize > dtype.itemsize)


def _cast_forward(self: Any, x: Tensor) -> Tensor:
    import torch
    from torch.nn import functional as F

    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, self.weight, self.bias)
    from ftune.ops.linear import cast_linear

    return cast_linear(x, self.weight, self.bias, torch.get_autocast_dtype(x.device.type))


# --- LoRA --------------------------------------------------------------------------------------------------


def lean_low_rank(model: nn.Module) -> int:
    """Let PEFT's LoRA layers without dropout compute through one autograd function; returns how many."""
    from peft.tuners.lora.layer import Linear

    count = 0
    for module in model.modules():
        if isinstance(module, Linear) and _plain_lora(module):
            with_forward(module, _low_rank_forward)
            count += 1
    return count


def _plain_lora(module: Any) -> bool:
    """Whether a PEFT layer is LoRA and nothing more: one adapter, no dropout, no variant, no bias of its own."""
    import torch

    name = module.active_adapter[0]
    return (
        len(module.active_adapters) == 1
        and len(module.lora_A) == 1
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_B[name].bias is None
        and not module.fan_in_fan_out
    )


def _low_rank_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    import torch

    if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
        # of the class that PEFT made
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    from ftune.ops.linear import low_rank_linear, low_rank_update

    name = self.active_adapter[0]
    a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    base = self.get_base_layer()
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else a.dtype
    if type(base) is torch.nn.Linear and base.weight.dtype == dtype and not base.weight.requires_grad:
        return low_rank_linear(x if x.dtype == dtype else x.to(dtype), base.weight, base.bias, a, b, scale)
    out = base(x, *args, **kwargs)
    return low_rank_update(x if x.dtype == out.dtype else x.to(out.dtype), out, a, b, scale)
