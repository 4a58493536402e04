"""Layers of a loaded model replaced by ones that compute the same and keep less for the backward pass.

A layer is replaced only where a trial on the layer itself shows the same output; what is not recognised stays as it
is. The replacement is a subclass made for the occasion: parameters, names, hooks and files stay as they were.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from ftune.models.head import plain_head

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftune.ops.recompute import Activation

__all__ = ["lean_base", "with_forward"]

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
    head = plain_head(model)  # whose product is part of the loss
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

    from ftune.ops.eager import EAGER
    from ftune.ops.kernels import using

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

    from ftune.ops.eager import EAGER
    from ftune.ops.kernels import TRIAL_TOKENS, using

    # What differs between training and evaluation would not show: the trial is without dropout.
    if not _takes_one(module) or any("dropout" in name for name in (*vars(module), *dict(module.named_children()))):
        return False
    weight = next(module.gate_proj.parameters())
    width = getattr(module.gate_proj, "in_features", None)
    if width is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TRIAL_TOKENS, width, generator=generator).to(weight.device, dtype)
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

_ROTATING: dict[Callable[..., Any], Callable[..., Any]] = {}
"""What ``_rotating`` made of a forward; of what it made, the same."""


def _turns(module: nn.Module) -> bool:
    """Whether a layer's forward calls its module's function by name, and that function is the usual one."""
    forward = type(module).forward
    code = getattr(forward, "__code__", None)
    if code is None or _ROTARY not in code.co_names or forward.__closure__ is not None:
        return False
    original = forward.__globals__.get(_ROTARY)
    return inspect.isfunction(original) and _same_rotary(original)


def _rotating(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same forward, that finds ftune's function where it looks for its module's: no other model is touched.

    All else it finds as its module had it just now.
    """
    if forward in _ROTATING:
        return _ROTATING[forward]
    original = forward.__globals__[_ROTARY]

    @functools.wraps(original)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        usual = not args and not kwargs and _usual(q, k, cos, sin)
        return _rotary(q, k, cos, sin) if usual else original(q, k, cos, sin, *args, **kwargs)

    found = FunctionType(
        forward.__code__, {**forward.__globals__, _ROTARY: rotary}, forward.__name__, forward.__defaults__
    )
    found.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(found, forward)
    _ROTATING[forward] = _ROTATING[found] = found
    return found


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from ftune.ops.rotary import rotate

    return rotate(q, k, cos, sin)


def _usual(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether heads (B, H, L, D) are turned as a whole."""
    whole = q.ndim == k.ndim == 4 and q.shape[2:] == k.shape[2:] == cos.shape[1:] == sin.shape[1:]
    return whole and not cos.requires_grad and not sin.requires_grad


@functools.cache
def _same_rotary(original: Callable[..., Any]) -> bool:
    """Whether a function turns as ``_rotary`` does, to the bit."""
    import torch

    from ftune.ops.eager import EAGER
    from ftune.ops.kernels import using

    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (
        torch.randn(shape, generator=generator) for shape in ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    )
    with torch.no_grad(), using(EAGER):
        # Some answer in the dtype of the queries, whatever that of the cosines is.
        for dtype, angles in ((torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
            given = [q.to(dtype), k.to(dtype), cos.to(angles), sin.to(angles)]
            try:
                theirs = original(*given)
            except Exception:  # one of the same name that takes or does something else, and fails in its own way
                return False
            if len(theirs) != 2 or not all(map(_equal, theirs, _rotary(*given))):
                return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    import torch

    return one.dtype == other.dtype and torch.equal(one, other)


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
