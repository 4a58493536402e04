"""Base weights in 4 or 8 bits: made so while loading, or stored so by bitsandbytes.

A base stored in 4 bits is trained on as a run with a ``quantization`` block is: the block is read from its files, and
what follows (the plan's memory, the merge, the conversion) is the same. One stored in 8 bits is dequantized as it is
loaded: bitsandbytes' 8-bit product rounds what it multiplies to fp16 and 8 bits, so that what trains against it is not
what a merge could write. Every other scheme is refused by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

from ftune.errors import ModelError
from ftune.methods import METHODS, Method
from ftune.methods.quantization import Quantization
from ftune.methods.targets import list_linears
from ftune.models.quantization import is_4bit

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftune.recipe.schema import Recipe

__all__ = [
    "adopt_4bit",
    "as_stored",
    "dense_of_8bit",
    "forget_quantization",
    "keep_packed",
    "leave_file",
    "quantize",
    "stored_bits",
]


def stored_bits(config: Any, name: str) -> Literal[4, 8] | None:
    """In how many bits bitsandbytes stored a model's weights; None where they are not quantized.

    Args:
        config: Its transformers configuration.
        name: The model's, for messages.

    Raises:
        ModelError: They are quantized in a way that ftune cannot train on.
    """
    found = getattr(config, "quantization_config", None)
    found = getattr(config, "compression_config", None) if found is None else found
    if found is None:
        return None
    settings = found if isinstance(found, dict) else found.to_dict()
    in_bits = bool(settings.get("load_in_4bit") or settings.get("load_in_8bit"))
    scheme = settings.get("quant_method") or ("bitsandbytes" if in_bits else "unknown")
    known = settings.get("bnb_4bit_quant_type", "fp4") in ("nf4", "fp4")
    if scheme == "bitsandbytes" and in_bits and known:
        from ftune.recipe.locate import is_installed

        if not is_installed("bitsandbytes"):
            raise ModelError(
                f"`{name}` is stored in 4 or 8 bits, which needs the package `bitsandbytes`",
                help="pip install 'ftune[qlora]'",
            )
        return 4 if settings.get("load_in_4bit") else 8
    raise ModelError(
        f"`{name}` is quantized by `{getattr(scheme, 'value', scheme)}`, which ftune does not train on",
        help="take the model that it was made of, with `method: {name: qlora}` to keep it in 4 bits; what bitsandbytes "
        "stored in 4 or 8 bits is taken as it is",
    )


def as_stored(recipe: Recipe, config: Any) -> Recipe:
    """The recipe with the ``quantization`` block that says how its base is stored, where that is in 4 bits.

    Args:
        recipe: What to run.
        config: The base's transformers configuration.

    Raises:
        ModelError: The method cannot train on such a base, or the recipe asks for another quantization than it has.
    """
    bits, method, name = stored_bits(config, recipe.model.id), recipe.method, recipe.model.id
    if bits is None:
        return recipe
    if method.artifact == "model" or (bits == 4 and not method.quantizable):
        able = [kind for kind, cls in METHODS.items() if cls.quantizable]
        raise ModelError(
            f"`{name}` is stored in {bits} bits, and `{method.name}` needs weights that are not quantized",
            help=f"use one of {', '.join(able)}, or the model that it was made of",
        )
    if bits == 8:
        return recipe
    settings = config.quantization_config
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    stored = {
        "type": settings.get("bnb_4bit_quant_type", "fp4"),
        "double": bool(settings.get("bnb_4bit_use_double_quant", False)),
    }
    asked = getattr(method, "quantization", None)
    if asked is not None:
        written = {key: getattr(asked, key) for key in asked.model_fields_set & stored.keys()}
        if wrong := {key: value for key, value in written.items() if value != stored[key]}:
            key, value = next(iter(wrong.items()))
            raise ModelError(
                f"`method.quantization.{key}: {value}`, but `{name}` is stored with `{key}: {stored[key]}`",
                help=f"leave out `{key}`, or take the model that it was made of",
            )
    compute = asked.compute_dtype if asked is not None else "auto"
    method = method.model_copy(update={"quantization": Quantization(**stored, compute_dtype=compute)})
    for problem in method.problems(recipe):
        raise ModelError(f"`{name}` is stored in 4 bits: {problem.message}", help=problem.help)
    return recipe.model_copy(update={"method": method})


def adopt_4bit(model: nn.Module, method: Method, dtype: torch.dtype) -> None:
    """Let weights that were stored in 4 bits compute as those that are quantized while loading.

    Args:
        model: As transformers loads it.
        method: Says what dequantized weights are multiplied in.
        dtype: What the model computes in.
    """
    import torch

    quantization = method.base_quantization or Quantization()
    compute = quantization.config(dtype).bnb_4bit_compute_dtype
    for module in model.modules():
        if is_4bit(module):
            layer = cast(Any, module)
            layer.compute_dtype = compute
            layer.weight.quant_state.dtype = method.base_dtype(dtype)
            if layer.weight.dtype != torch.uint8:  # packed into another dtype, for FSDP's first version
                layer.weight.data = layer.weight.data.view(torch.uint8)
                layer.weight.quant_storage = layer.quant_storage = torch.uint8
    _cast_others(model, method.base_dtype(dtype))
    _keep_reversible(model)
    config: Any = model.config
    # Written beside what is saved: as the weights are now.
    config.quantization_config = quantization.config(dtype)


def dense_of_8bit(model: Any, dtype: torch.dtype) -> Any:
    """A model that was stored in 8 bits with plain weights, each exactly what its codes and scales mean."""
    import torch

    for name, module in list(model.named_modules()):
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is None:
            continue
        plain = torch.nn.Linear(
            module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype
        )
        weight = module.weight.data.float() * (scales.float() / 127).unsqueeze(1)
        plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
        plain.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    _cast_others(model, dtype)
    _keep_reversible(model)
    return forget_quantization(model)


def _cast_others(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not packed, which transformers leaves in the dtype of a quantized file."""
    import torch

    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    fp32 = [part for name in names for part in getattr(model, name, None) or ()]
    for name, parameter in model.named_parameters():
        if type(parameter) is torch.nn.Parameter and parameter.is_floating_point():
            kept = dtype.itemsize < 4 and any(part in name.split(".") for part in fp32)
            parameter.data = parameter.data.to(torch.float32 if kept else dtype)


def _keep_reversible(model: Any) -> None:
    """Forget how packed weights were read, which transformers would try to reverse as it saves the merged model."""

    def reversible(conversion: Any) -> bool:
        try:
            conversion.reverse_transform()
        except (NotImplementedError, ValueError):
            return False
        return True

    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [conversion for conversion in conversions if reversible(conversion)]


def forget_quantization(model: Any) -> Any:
    """Drop the traces of a quantized file: dequantized, the model is an ordinary one that can be saved."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    for attribute in ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit"):
        if hasattr(model, attribute):
            setattr(model, attribute, False)
    return model


def leave_file(model: nn.Module) -> None:
    """Copy the weights that are not quantized: one that still lies in the mapped file keeps all of it resident."""
    import torch

    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()


def keep_packed(model: nn.Module) -> None:
    """Keep 4-bit weights as they are packed.

    On CPUs with AVX512-BF16 the first evaluation forward repacks them in place, after which training loses
    gradients and dequantizing returns garbage.
    """
    for module in model.modules():
        if is_4bit(module):
            cast(Any, module).support_avx512bf16_for_cpu = False


def quantize(model: Any, config: Any, device: torch.device) -> None:
    """Quantize the projections inside the blocks of a dense model in place, as ``from_pretrained`` would.

    Args:
        model: A dense transformers model; its dtype is the one NF4 is taken from.
        config: A ``BitsAndBytesConfig``.
        device: Where the quantized layers go.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for linear in list_linears(model):
        if not linear.quantizable:
            continue
        layer = model.get_submodule(linear.name)
        packed = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=layer.bias is not None,
            compute_dtype=config.bnb_4bit_compute_dtype,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            device="meta",
        )
        packed.weight = Params4bit(
            layer.weight.data,
            requires_grad=False,
            quant_type=config.bnb_4bit_quant_type,
            compress_statistics=config.bnb_4bit_use_double_quant,
        )
        packed.bias = layer.bias
        parent, _, leaf = linear.name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed.to(device))
    model.to(device)
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.config.quantization_config = config
