"""Layers of a loaded model replaced by ones that compute the same and keep less for the backward pass.

A layer is replaced only where a trial on the layer itself shows the same output; what is not recognised stays as it
is. The replacement is a subclass made for the occasion: parameters, names, hooks and files stay as they were.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftune.ops.recompute import Activation

__all__ = ["lean_adalora", "lean_base", "lean_low_rank", "with_forward"]

_SUBCLASSES: dict[tuple[type, Callable[..., Any]], type] = {}


def with_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another ``forward(self, ...)``, through a subclass of its own class."""
    cls = type(module)
    if vars(cls).get("forward") is forward:
        return
    key = (cls, forward)
    if key not in _SUBCLASSES:
        _SUBCLASSES[key] = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    module.__class__ = _SUBCLASSES[key]


def lean_base(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Replace RMS norms, gated feed-forwards, rotary positions and trained linear layers.

    Args:
        model: The adapted model.
        dtype: What it computes in.

    Returns:
        How many layers of each kind were replaced.
    """
    import torch

    counts = {"norms": 0, "gates": 0, "rotary": 0, "linears": 0}
    head = cast(Any, model).get_output_embeddings()
    forward: Callable[..., Any] | None
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            kind, forms = "norms", (_plain_norm, _offset_norm)
            forward = next((form for form in forms if _same_norm(module, form, dtype)), None)
        elif _activation(module) is not None:
            kind, forward = "gates", _gated_forward if _same_gate(module, dtype) else None
        elif _turns(module):
            kind, forward = "rotary", _rotating(type(module).forward)
        elif type(module) is torch.nn.Linear and module is not head and _casts(module, dtype):
            kind, forward = "linears", _cast_forward
        else:
            continue
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


def _same_norm(module: nn.Module, forward: Callable[..., Tensor], dtype: torch.dtype) -> bool:
    """Whether a norm of one input computes the same, in the dtype of its gain and in that of the model."""
    import torch

    from ftune.ops.kernels import EAGER, using

    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 1 or _eps(module) is None or not _takes_one(module):
        return False
    if len(list(module.parameters())) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(4, len(weight), generator=generator).to(weight.device)
    with torch.no_grad(), using(EAGER):  # to the bit: other kernels sum in another order
        for x in (made.to(weight.dtype), made.to(dtype)):
            theirs, mine = module(x), forward(module, x)
            if theirs.dtype != mine.dtype or not torch.equal(theirs, mine):
                return False
    return True


def _takes_one(module: nn.Module) -> bool:
    """Whether the layer's forward has one parameter: a gated norm has another, which a trial would not see."""
    return len(inspect.signature(module.forward).parameters) == 1


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

    from ftune.ops.kernels import EAGER, using

    # What differs between training and evaluation would not show: the trial is without dropout.
    if not _takes_one(module) or any("dropout" in name for name in (*vars(module), *dict(module.named_children()))):
        return False
    weight = next(module.gate_proj.parameters())
    width = getattr(module.gate_proj, "in_features", None)
    if width is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, width, generator=generator).to(weight.device, dtype)
    was_training = module.training
    module.eval()  # no dropout
    try:
        autocast = torch.autocast(weight.device.type, dtype=dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), using(EAGER), autocast:
            return torch.equal(module(x), _gated_forward(module, x))
    finally:
        module.train(was_training)


# --- rotary positions --------------------------------------------------------------------------------------

_ROTARY = "apply_rotary_pos_emb"
"""What the function is called in the module of every architecture that has the usual one."""


def _turns(module: nn.Module) -> bool:
    """Whether a layer's forward calls its module's function by name, and that function is the usual one."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or _ROTARY not in code.co_names or forward.__closure__ is not None:
        return False
    original = forward.__globals__.get(_ROTARY)
    return inspect.isfunction(original) and _same_rotary(original)


@functools.cache
def _rotating(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, that finds ftune's function where it looks for its module's: no other model is touched."""
    original = forward.__globals__[_ROTARY]

    @functools.wraps(original)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _rotary(q, k, cos, sin) if _usual(q, cos, args, kwargs) else original(q, k, cos, sin, *args, **kwargs)

    found = FunctionType(
        forward.__code__, {**forward.__globals__, _ROTARY: rotary}, forward.__name__, forward.__defaults__
    )
    found.__kwdefaults__ = forward.__kwdefaults__
    return functools.update_wrapper(found, forward)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from ftune.ops.rotary import rotate

    return rotate(q, k, cos, sin)


def _usual(q: Tensor, cos: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether heads (B, H, L, D) are turned as a whole, and nothing is asked for besides."""
    return not args and not kwargs and q.ndim == 4 and cos.shape[1:] == (*q.shape[2:],) and not cos.requires_grad


@functools.cache
def _same_rotary(original: Callable[..., Any]) -> bool:
    """Whether a function turns as ``_rotary`` does, to the bit."""
    import torch

    from ftune.ops.kernels import EAGER, using

    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    with torch.no_grad(), using(EAGER):
        for dtype in (torch.float32, torch.bfloat16):
            given = [x.to(dtype) for x in (q, k, cos, sin)]
            try:
                theirs = original(*given)
            except Exception:  # one of the same name that takes or does something else, and fails in its own way
                return False
            if len(theirs) != 2 or not all(map(torch.equal, theirs, _rotary(*given))):
                return False
    return True


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
    """Let PEFT's LoRA and DoRA layers without dropout compute through one autograd function; returns how many."""
    from peft.tuners.lora.layer import LoraLayer

    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer) and _plain_lora(module):
            with_forward(module, _dora_forward if module.lora_variant else _low_rank_forward)
            if module.lora_variant:
                # now: among the activations of the first step they would split the heap for good
                _NORMS[module] = _Norms(_squares(module).clone())
                _updates()
            count += 1
    return count


def lean_adalora(model: nn.Module) -> int:
    """Let PEFT's AdaLoRA layers without dropout compute as LoRA does over ``diag(E) A``; returns how many."""
    import torch
    from peft.tuners.adalora import AdaLoraLayer

    count = 0
    for module in model.modules():
        if (
            isinstance(module, AdaLoraLayer)
            and type(module).__name__ in ("SVDLinear", "SVDLinear4bit")
            and len(module.lora_A) == len(module.active_adapters) == 1
            and isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity)
            and not getattr(module, "fan_in_fan_out", False)
        ):
            with_forward(module, _adalora_forward)
            count += 1
    return count


def _plain_lora(module: Any) -> bool:
    """Whether a PEFT layer is LoRA or DoRA of a linear layer and nothing more: one adapter, no dropout, no bias."""
    import torch
    from peft.tuners.lora.variants import DoraLinearVariant

    name = module.active_adapter[0]
    return (
        type(module).__name__ in ("Linear", "Linear4bit")
        and len(module.active_adapters) == 1
        and len(module.lora_A) == 1
        and type(module.lora_variant.get(name)) in (type(None), DoraLinearVariant)
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_B[name].bias is None
        and not getattr(module.get_base_layer().bias, "requires_grad", False)
        and not module.fan_in_fan_out
    )


def _low_rank_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
        # of the class that PEFT made
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    name = self.active_adapter[0]
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    return _updated(self, x, self.get_base_layer().bias, a, b, self.scaling[name])


def _adalora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if self.disable_adapters or self.merged:
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    name = self.active_adapters[0]
    # A tensor: asking for its value would wait for the device in every layer. fp32, whatever the base's dtype.
    factor = self.scaling[name] / (self.ranknum[name].float() + 1e-5)
    scaled_e = self.lora_E[name] * factor
    return _updated(self, x, self.get_base_layer().bias, self.lora_A[name] * scaled_e, self.lora_B[name], 1.0)


def _dora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if self.disable_adapters or self.merged or kwargs.get("adapter_names") is not None:
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    from ftune.ops.linear import scale_directions

    name, base = self.active_adapter[0], self.get_base_layer()
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    norms = _norms(self, x, a, b, self.scaling[name])
    updated = _updated(self, x, None, a, b, self.scaling[name])
    out = scale_directions(updated, self.lora_magnitude_vector[name].weight, norms)
    return out if base.bias is None else out + base.bias.to(out.dtype)


def _updated(self: Any, x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W^T + scale * x A^T B^T``, plus the bias if it is wanted."""
    import torch

    from ftune.ops.linear import low_rank_linear, low_rank_update

    base = self.get_base_layer()
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else a.dtype
    if type(base) is torch.nn.Linear and base.weight.dtype == dtype and not base.weight.requires_grad:
        return low_rank_linear(x if x.dtype == dtype else x.to(dtype), base.weight, bias, a, b, scale)
    if _is_4bit(base, dtype):
        bias = None if bias is None else bias.to(dtype)
        dense = functools.partial(_dequantized, state=base.weight.quant_state, dtype=dtype)
        return low_rank_linear(x if x.dtype == dtype else x.to(dtype), base.weight, bias, a, b, scale, dense)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(dtype)  # a trained norm's output is fp32, and a 4-bit layer answers in the dtype it is asked in
    out = base(x)
    if bias is None and base.bias is not None:
        out = out - base.bias.to(out.dtype)
    return low_rank_update(x if x.dtype == out.dtype else x.to(out.dtype), out, a, b, scale)


def _is_4bit(base: Any, dtype: torch.dtype) -> bool:
    """Whether a layer multiplies with a 4-bit weight (O, I) in a dtype, and does nothing else."""
    state = getattr(base.weight, "quant_state", None)
    return (
        type(base).__name__ == "Linear4bit"
        and state is not None
        and tuple(state.shape) == (base.out_features, base.in_features)
        and base.compute_dtype in (None, dtype)
        # the layout of inference on a CPU
        and not getattr(state, "packing_format_for_cpu", False)
    )


def _dequantized(packed: Tensor, *, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return cast("Tensor", dequantize_4bit(packed, state)).to(dtype)


class _Norms(NamedTuple):
    """Norms (O,) fp32 of the rows of a layer's adapted matrix, and what they were computed from; at first, nothing.

    ``weights`` are A and B themselves: while they are held, no other tensor has their ids.
    """

    norms: Tensor
    made_of: tuple[Any, ...] | None = None
    weights: tuple[Tensor, ...] = ()


# Not on the layers: their copies, and what is pickled of them, are not to have it.
_NORMS: WeakKeyDictionary[Any, _Norms] = WeakKeyDictionary()


@functools.cache
def _updates() -> list[int]:
    """How many updates all optimizers of this process have made, as a list of one, counted from the first call.

    torch's fused optimizers and bitsandbytes' write into parameters without raising their version.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    made = [0]

    def count(*_: Any) -> None:
        made[0] += 1

    register_optimizer_step_post_hook(count)
    return made


def _norms(self: Any, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Norms (O,) fp32 of the rows of the adapted matrix: once for all micro-batches of an update."""
    import torch

    from ftune.ops.linear import direction_norms

    made_of: tuple[Any, ...] | None = None
    if all(_tells_changes(weight) for weight in (a, b)):
        kind = x.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        states = [(id(weight), weight._version, weight.data_ptr()) for weight in (a, b)]
        made_of = (*states, _updates()[0], scale, x.dtype, low)
    kept = _NORMS.get(self)
    if kept is not None and made_of is not None and kept.made_of == made_of:
        return kept.norms
    norms = direction_norms(_squares(self, a.device), _product(self.get_base_layer(), a.detach(), x), a, b, scale)
    if made_of is not None:
        # In the same memory; no backward pass reads it.
        norms = kept.norms.copy_(norms) if kept is not None and kept.norms.device == norms.device else norms
        _NORMS[self] = _Norms(norms, made_of, (a, b))
    return norms


def _tells_changes(weight: Tensor) -> bool:
    """Whether a parameter's version, or an optimizer's step, shows that it changed.

    DeepSpeed writes into a flat tensor that parameters are parts of (ZeRO-2), or puts another one in their place
    (ZeRO-3), behind the back of both.
    """
    from ftune.ops.sharded import is_sharded

    if is_sharded(weight) or weight.is_inference():
        return False
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _product(base: Any, a_RI: Tensor, x: Tensor) -> Tensor:
    """``A W^T``, through the base layer itself: it knows how it keeps its weight."""
    import torch

    with torch.no_grad():
        out: Tensor = base(a_RI.to(x.dtype))
        return out if base.bias is None else out - base.bias.to(out.dtype)


def _squares(module: Any, device: torch.device | None = None) -> Tensor:
    """Squared norms (O,) fp32 of the rows of a frozen weight, on a device or where they are; computed once."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    found: Tensor | None = vars(module).get("_ftune_squares")
    if found is None:
        with torch.no_grad():
            weight = dequantize_module_weight(module.get_base_layer())
            found = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
        module._ftune_squares = found
    if device is not None and found.device != device:  # a model that was made lean in the host's memory
        found = module._ftune_squares = found.to(device)
    return found
