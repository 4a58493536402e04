"""The sizes of a base model, read from its configuration alone.

The model is built on the meta device, where a parameter has a shape and no storage, and its modules are
walked without knowing the architecture. So a 70B model costs a second and a few megabytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ftune.errors import ModelError
from ftune.methods.targets import list_linears
from ftune.methods.types import Linear, ModelShape
from ftune.models.language import fixed_parameters, in_language_model, language_prefixes
from ftune.plan.unreadable import CORRECT, why_not

__all__ = ["auto_class", "build_on_meta", "read_shape", "shape_of"]


def read_shape(config: Any, *, trust_remote_code: bool = False) -> ModelShape:
    """Read the sizes of the causal language model that a transformers configuration describes.

    Args:
        config: A ``transformers.PretrainedConfig``; it is not changed.
        trust_remote_code: Run the Python code that the model comes with, where its configuration names some.

    Raises:
        ModelError: transformers has no causal language model for this configuration, or only the model's own
            code has, and it is not trusted.
    """
    return shape_of(build_on_meta(config, trust_remote_code=trust_remote_code))


def build_on_meta(config: Any, *, trust_remote_code: bool = False, attention: str | None = None) -> Any:
    """Build the causal language model that a configuration describes, without weights.

    Args:
        config: A ``transformers.PretrainedConfig``; it is not changed.
        trust_remote_code: As of ``read_shape``.
        attention: The implementation to build it with; None: what transformers takes for this architecture.

    Raises:
        ModelError: As ``read_shape``.
    """
    try:
        with torch.device("meta"), warnings.catch_warnings():
            # warnings about initial values are void where there are no values
            warnings.simplefilter("ignore")
            asked = {} if attention is None else {"attn_implementation": attention}
            # False is said as well: left unsaid, transformers asks the user at the terminal
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **asked)
    except (ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, ImportError) as error:
        help = "use a decoder that transformers' AutoModelForCausalLM or AutoModelForImageTextToText knows"
        if type(config) in auto_class(config)._model_mapping:
            help = CORRECT
        if not trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            help = "the model comes with its own code: read it, and then set `model.trust_remote_code: true`"
        why = why_not(config.to_dict(), error)
        raise ModelError(
            f"cannot build a causal language model of type `{config.model_type}`: {why}", help=help
        ) from error


def auto_class(config: Any) -> Any:
    """The class of transformers that reads a model whole: with the part that sees images, where there is one.

    Args:
        config: A ``transformers.PretrainedConfig``.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    sees_images = type(config) in AutoModelForImageTextToText._model_mapping
    if sees_images and config.get_text_config(decoder=True) is not config and not own_code:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def shape_of(model: Any) -> ModelShape:
    """Read the sizes of a built transformers model; only shapes are looked at, so any device will do.

    ``extra`` holds what the memory estimate needs beside the named sizes:

    - ``norm_width``: elements that all norms of the model read for one token;
    - ``rms``: whether they are RMS norms, which transformers computes through an fp32 copy;
    - ``ffn_width``: elements of the feed-forward's inner activation for one token, over all blocks;
    - ``pre_norm``: whether RMS norms stand before attention and feed-forward, so that their output is made again;
    - ``lean_gate``: whether the feed-forward is gated in the common build, so that its product is made again;
    - ``ffn_saved``: how many tensors of that width autograd keeps when the weights are frozen;
    - ``head_elements``: elements of the output head's weight, tied or not;
    - ``vectors``: elements of all parameters that are no matrices: norms and biases;
    - ``sliding_window``: the shortest attention window, or None;
    - ``fused_experts``: whether the weights of several experts are one parameter;
    - ``transposed``: whether projections are kept transposed, as ``Conv1D``;
    - ``max_positions``: the longest row the model was made for, or None;
    - ``softcap``: whether attention scores are capped; ``attention_dropout``: whether they are dropped out.

    Args:
        model: A causal language model of transformers, without adapters.
    """
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    layers = int(config.num_hidden_layers)
    heads = int(_first(config, "num_attention_heads") or 1)
    kv_heads = int(_first(config, "num_key_value_heads") or heads)
    head_dim = int(_first(config, "head_dim") or hidden // heads)

    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    linears = list_linears(model)
    norms = norm_width = 0
    rms, prefixes = False, language_prefixes(model)
    for name, module in model.named_modules():
        if not in_language_model(name, prefixes):
            continue
        kind = type(module).__name__.lower()
        if "norm" not in kind:
            continue
        elements = [parameter.numel() for parameter in module.parameters(recurse=False)]
        norms += sum(elements)
        rms = rms or "rms" in kind
        norm_width += _norm_width(name, elements[0] if elements else hidden, heads, kv_heads, head_dim, hidden)

    intermediate = int(
        _first(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") or _inner_width(linears, hidden)
    )
    experts = int(_first(config, "num_experts_per_tok") or 0)
    expert_width = int(_first(config, "moe_intermediate_size") or intermediate)
    gated = any("gate_proj" in name or "gate_up" in name for name, _ in model.named_parameters())
    leaves = {linear.name.rpartition(".")[2] for linear in linears}
    activation = str(_first(config, "hidden_act", "hidden_activation", "activation_function"))
    lean_gate = not experts and activation in _LEAN_ACTIVATIONS and {"gate_proj", "up_proj", "down_proj"} <= leaves
    head_elements = 0 if head is None else head.weight.numel()
    tied = head is not None and head.weight is embedding.weight
    return ModelShape(
        model_type=str(config.model_type),
        linears=linears,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        fixed=sum(model.get_parameter(name).numel() for name in fixed_parameters(model)),
        embedding=embedding.weight.numel(),
        head=0 if tied else head_elements,
        norms=norms,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=int(embedding.weight.shape[0]),
        extra={
            "norm_width": norm_width,
            "rms": rms,
            "pre_norm": rms and any(name.endswith("input_layernorm") for name, _ in model.named_modules()),
            "ffn_width": layers * (experts * expert_width if experts else intermediate),
            "ffn_saved": 2
            if lean_gate
            else (2 if gated else 0) + (_COMPOSED if activation in _COMPOSED_ACTIVATIONS else 1),
            "lean_gate": lean_gate,
            "head_elements": head_elements,
            "vectors": sum(parameter.numel() for parameter in model.parameters() if parameter.ndim < 2),
            "sliding_window": _window(config),
            "max_positions": _first(config, "max_position_embeddings"),
            "softcap": bool(_first(config, "attn_logit_softcapping")),
            "fused_experts": _has_fused_experts(model),
            "transposed": any(isinstance(module, Conv1D) for module in model.modules()),
            "attention_dropout": bool(_first(config, "attention_dropout", "attn_pdrop")),
        },
    )


# transformers composes these of elementary operations, each of which keeps its input
_COMPOSED_ACTIVATIONS = ("gelu_new", "gelu_fast", "quick_gelu", "gelu_python", "gelu_pytorch_tanh_python")
_COMPOSED = 4
# of a gated feed-forward that ftune.methods._lean replaces
_LEAN_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")


def _has_fused_experts(model: Any) -> bool:
    """Whether a parameter holds a matrix for each of several experts."""
    return any(
        parameter.ndim == 3 and parameter.shape[0] > 1 and "expert" in f"{name}.{type(module).__name__}.{leaf}".lower()
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
    )


def _first(config: Any, *keys: str) -> Any:
    """The first of several configuration keys that is set; architectures name the same size differently.

    Of a size that each layer has its own of the largest is taken.
    """
    found = next((value for key in keys if (value := getattr(config, key, None)) is not None), None)
    return max(found) if isinstance(found, list | tuple) and found else found


def _window(config: Any) -> int | None:
    """The attention window in tokens, where the configuration uses one."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window = _first(config, "sliding_window")
    return None if window is None else int(window)


def _norm_width(name: str, elements: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> int:
    """Elements that a norm reads for one token: a norm on a head's width runs once for each head."""
    if elements != head_dim or elements == hidden:
        return elements
    own_name = name.rpartition(".")[2]
    return elements * (kv_heads if own_name.startswith("k") else heads)


def _inner_width(linears: Sequence[Linear], hidden: int) -> int:
    """Width of the feed-forward block: the widest input of a projection back to the residual stream."""
    return max((linear.in_features for linear in linears if linear.out_features == hidden), default=4 * hidden)
