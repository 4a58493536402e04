"""PEFT's LoRA, DoRA and AdaLoRA layers computed by ``ftune.ops.linear``, the same and keeping less.

Layers that read one input, such as the projections to queries, keys and values, are computed together.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

from ftune.methods._lean import with_forward
from ftune.methods._written import COPIES, mark_written

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ftune.ops.linear import Adapted

__all__ = ["lean_adalora", "lean_low_rank"]


def lean_low_rank(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Let PEFT's LoRA and DoRA layers without dropout compute through one autograd function; returns how many.

    Args:
        model: The adapted model.
        dtype: What it computes in; None: fp32.
    """
    import torch
    from peft.tuners.lora.layer import LoraLayer

    found = []
    for module in model.modules():
        if isinstance(module, LoraLayer) and _plain_lora(module):
            with_forward(module, _dora_forward if module.lora_variant else _low_rank_forward)
            if module.lora_variant:
                # now: among the activations of the first step they would split the heap for good
                _NORMS[module] = _Norms(_squares(module).clone())
                _updates()
            found.append(module)
    _let_share(model, found, dtype)
    kept = [module for module in found if module.lora_variant and module.get_base_layer().bias is None]
    if kept:
        mark_written(model, kept, dtype or torch.float32)
    return len(found)


def lean_adalora(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Let PEFT's AdaLoRA layers without dropout compute as LoRA does over ``diag(E) A``; returns how many.

    The arguments are those of ``lean_low_rank``.
    """
    import torch
    from peft.tuners.adalora import AdaLoraLayer

    found = []
    for module in model.modules():
        if (
            isinstance(module, AdaLoraLayer)
            and type(module).__name__ in ("SVDLinear", "SVDLinear4bit")
            and len(module.lora_A) == len(module.active_adapters) == 1
            and isinstance(module.lora_dropout[module.active_adapters[0]], torch.nn.Identity)
            and not getattr(module, "fan_in_fan_out", False)
        ):
            with_forward(module, _low_rank_forward)
            found.append(module)
    _let_share(model, found, dtype)
    return len(found)


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


# --- forwards ----------------------------------------------------------------------------------------------


def _low_rank_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _is_off(self) or kwargs.get("adapter_names") is not None:
        # of the class that PEFT made
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    return _updated(self, x)


def _dora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if _is_off(self) or kwargs.get("adapter_names") is not None:
        return type(self).__mro__[1].forward(self, x, *args, **kwargs)  # type: ignore[attr-defined]
    from ftune.ops.linear import scale_directions

    name, base = self.active_adapter[0], self.get_base_layer()
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    norms = _norms(self, x, a, b, self.scaling[name])
    out = scale_directions(_updated(self, x), self.lora_magnitude_vector[name].weight, norms)
    if base.bias is not None:
        return out + base.bias.to(out.dtype)
    return out.clone() if getattr(self, COPIES, False) else out


def _is_off(module: Any) -> bool:
    return bool(module.disable_adapters or module.merged)


def _update_of(module: Any) -> tuple[Tensor | None, Tensor, Tensor, float]:
    """The bias that is wanted, A, B and the scale of a layer."""
    bias, name = module.get_base_layer().bias, module.active_adapters[0]
    if hasattr(module, "lora_E"):
        # A tensor: asking for its value would wait for the device in every layer. fp32, whatever the base's dtype.
        factor = module.scaling[name] / (module.ranknum[name].float() + 1e-5)
        return bias, module.lora_A[name] * (module.lora_E[name] * factor), module.lora_B[name], 1.0
    # DoRA scales the product, and adds the bias then.
    bias = None if module.lora_variant else bias
    return bias, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def _updated(module: Any, x: Tensor) -> Tensor:
    """``x W^T + scale * x A^T B^T``, plus the bias if it is wanted."""
    from ftune.ops.linear import low_rank_linears, low_rank_update

    shared = _product_of_all(module, x)
    if shared is not None:
        return shared
    dtype = _dtype(module, x)
    adapted = _adapted(module, dtype)
    if adapted is not None:
        return low_rank_linears(x.to(dtype), [adapted])[0]
    base = module.get_base_layer()
    if _autocasts(x):
        # A trained norm's output is fp32, and a 4-bit layer answers in the dtype that it is asked in.
        x = x.to(dtype)
    bias, a, b, scale = _update_of(module)
    out = base(x)
    if bias is None and base.bias is not None:
        out = out - base.bias.to(out.dtype)
    return low_rank_update(x.to(out.dtype), out, a, b, scale)


def _autocasts(x: Tensor) -> bool:
    import torch

    return torch.is_autocast_enabled(x.device.type)


def _dtype(module: Any, x: Tensor) -> torch.dtype:
    """What a layer computes in."""
    import torch

    if _autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    a = module.lora_A[module.active_adapters[0]]
    return cast("torch.dtype", getattr(a, "weight", a).dtype)


def _adapted(module: Any, dtype: torch.dtype) -> Adapted | None:
    """The layer for ``ftune.ops.linear`` where it computes in a dtype; None where only its base layer can multiply."""
    import torch

    from ftune.ops.linear import Adapted

    base = module.get_base_layer()
    plain = type(base) is torch.nn.Linear and base.weight.dtype == dtype and not base.weight.requires_grad
    # Where nothing is to be trained bitsandbytes has kernels for a few tokens that never make the whole weight.
    if not plain and not (torch.is_grad_enabled() and _is_4bit(base, dtype)):
        return None
    bias, a, b, scale = _update_of(module)
    dense = None if plain else functools.partial(_dequantized, state=_quant_state(base), dtype=dtype)
    return Adapted(base.weight, None if bias is None else bias.to(dtype), a, b, scale, dense)


def _is_4bit(base: Any, dtype: torch.dtype) -> bool:
    """Whether a layer multiplies with a 4-bit weight (O, I) in a dtype, and does nothing else."""
    state = _quant_state(base)
    return (
        type(base).__name__ == "Linear4bit"
        and state is not None
        and tuple(state.shape) == (base.out_features, base.in_features)
        and base.compute_dtype in (None, dtype)
        # the layout of inference on a CPU
        and not getattr(state, "packing_format_for_cpu", False)
    )


def _quant_state(base: Any) -> Any:
    """Of the layer, where its weight is one that FSDP2 put together."""
    return getattr(base.weight, "quant_state", None) or getattr(base, "quant_state", None)


def _dequantized(packed: Tensor, *, state: Any, dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return cast("Tensor", dequantize_4bit(packed, state)).to(dtype)


# --- layers that read one input ----------------------------------------------------------------------------

_READERS: WeakKeyDictionary[Any, tuple[weakref.ref[Any], ...]] = WeakKeyDictionary()
"""Of each adapted layer that reads the same tensor as others: all of them, in the order in which they are called."""


class _Products(NamedTuple):
    """What the first of some layers made for those behind it.

    ``of`` is the input, and the state of torch that it was read in: in another one products would have no graph.
    """

    of: tuple[Any, ...]
    made: dict[int, Tensor]


# One at a time: what a failed pass left is gone as soon as another one begins.
_products: _Products | None = None


def _let_share(model: Any, adapted: list[Any], dtype: torch.dtype | None) -> None:
    """Find the layers that read one tensor, by watching them in a forward pass of a few tokens.

    It is settled before training, and so the same where a block is recomputed.
    """
    import torch

    from ftune.ops.kernels import TRIAL_TOKENS

    calls: list[tuple[Any, Tensor]] = []
    hooks = [layer.register_forward_pre_hook(lambda layer, given: calls.append((layer, given[0]))) for layer in adapted]
    was_training = model.training
    model.eval()
    try:
        device = model.get_input_embeddings().weight.device
        autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype not in (None, torch.float32))
        with torch.no_grad(), autocast:
            ids = torch.arange(TRIAL_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
            model(input_ids=ids, use_cache=False)
    except Exception:  # an architecture that wants more than tokens; it fails in its own ways
        return
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    called = Counter(id(layer) for layer, _ in calls)
    readers: dict[int, list[Any]] = {}
    for layer, x in calls:
        if called[id(layer)] == 1:
            readers.setdefault(id(x), []).append(layer)
    for layers in readers.values():
        if len(layers) > 1:
            _READERS.update(dict.fromkeys(layers, tuple(map(weakref.ref, layers))))


def _product_of_all(module: Any, x: Tensor) -> Tensor | None:
    """``_updated`` of a layer among those that read one input; None where it has to make that itself.

    The first of them makes the products of all, whenever it is called: in a block that is recomputed as in the
    forward pass.
    """
    import torch

    global _products
    readers = _READERS.get(module)
    if readers is None or x.is_inference():
        return None
    state = (x._version, torch.is_grad_enabled(), _autocasts(x))
    if readers[0]() is not module:
        if _products is None or _products.of[0]() is not x or _products.of[1:] != state:
            return None
        return _products.made.pop(id(module), None)
    _products = None
    modules = [reference() for reference in readers]
    if any(each is None or _is_off(each) or _is_gathered_alone(each) for each in modules):
        return None
    dtype = _dtype(module, x)
    layers = [_adapted(each, dtype) for each in modules]
    if None in layers:
        return None
    from ftune.ops.linear import low_rank_linears

    mine, *others = low_rank_linears(x.to(dtype), cast("list[Adapted]", layers))
    made = {id(each): out for each, out in zip(modules[1:], others, strict=True)}
    _products = _Products((weakref.ref(x), *state), made)
    return mine


def _is_gathered_alone(module: Any) -> bool:
    """Whether a layer's weights are there only while it is called itself (DeepSpeed's ZeRO-3)."""
    from ftune.ops.sharded import is_sharded

    return is_sharded(module.get_base_layer().weight)


# --- DoRA --------------------------------------------------------------------------------------------------


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
    """Norms (O,) fp32 of the rows of the adapted matrix: once for all micro-batches of an update, unless recorded."""
    import torch

    from ftune.ops.linear import direction_norms
    from ftune.ops.recording import is_recording

    made_of: tuple[Any, ...] | None = None
    if not is_recording() and all(_tells_changes(weight) for weight in (a, b)):
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
