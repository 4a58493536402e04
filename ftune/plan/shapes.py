"""The sizes of a base model, read from its configuration alone.

The model is built on the meta device, where a parameter has a shape and no storage, and its modules are walked
without knowing the architecture. So a 70B model costs a second and a few megabytes.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ftune.errors import ModelError
from ftune.methods.base import Linear, ModelShape

__all__ = ["read_shape", "shape_of"]


def read_shape(config: Any) -> ModelShape:
    """Read the sizes of the causal language model that a transformers configuration describes.

    Args:
        config: A ``transformers.PretrainedConfig``; it is not changed.

    Raises:
        ModelError: transformers has no causal language model for this configuration.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            # warnings about initial values are void where there are no values
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"cannot build a causal language model of type `{config.model_type}`: {error}",
            help="use a decoder that transformers' AutoModelForCausalLM knows",
        ) from error
    return shape_of(model)


def shape_of(model: Any) -> ModelShape:
    """Read the sizes of a built transformers model; only shapes are looked at, so any device will do.

    ``extra`` holds what the memory estimate needs beside the named sizes, for the whole model:
    ``norm_width``: elements that all norms together read for one token; ``rms``: whether they are RMS norms, which
    transformers computes through an fp32 copy; ``gated``: whether the feed-forward multiplies two projections;
    ``ffn_width``: elements of the feed-forward's inner activation for one token, over all blocks;
    ``head_elements``: elements of the output head's weight, tied or not.

    Args:
        model: A causal language model of transformers, without adapters.
    """
    from transformers.pytorch_utils import Conv1D

    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    layers = int(config.num_hidden_layers)
    heads = int(getattr(config, "num_attention_heads", None) or 1)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)

    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linears: list[Linear] = []
    norms = norm_width = 0
    rms = False
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape  # the transpose of nn.Linear's
        elif isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
        elif "norm" in type(module).__name__.lower():
            elements = [parameter.numel() for parameter in module.parameters(recurse=False)]
            norms += sum(elements)
            rms = rms or "rms" in type(module).__name__.lower()
            norm_width += _norm_width(name, elements[0] if elements else hidden, heads, kv_heads, head_dim, hidden)
            continue
        else:
            continue
        if module is not head and name.startswith(lists):
            linears.append(Linear(name, int(inputs), int(outputs)))

    intermediate = _intermediate(config, linears, hidden)
    active = int(getattr(config, "num_experts_per_tok", None) or 1)
    expert_width = int(getattr(config, "moe_intermediate_size", None) or intermediate)
    names = [parameter_name for parameter_name, _ in model.named_parameters()]
    return ModelShape(
        model_type=str(config.model_type),
        linears=tuple(linears),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=embedding.weight.numel(),
        head=0 if head is None or head.weight is embedding.weight else head.weight.numel(),
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
            "gated": any("gate_proj" in name or "gate_up" in name for name in names),
            "ffn_width": layers * (active * expert_width if active > 1 else intermediate),
            "head_elements": 0 if head is None else head.weight.numel(),
        },
    )


def _norm_width(name: str, elements: int, heads: int, kv_heads: int, head_dim: int, hidden: int) -> int:
    """Elements that a norm reads for one token: a norm on a head's width runs once for each head."""
    if elements != head_dim or elements == hidden:
        return elements
    own_name = name.rpartition(".")[2]
    return elements * (kv_heads if own_name.startswith("k") else heads)


def _intermediate(config: Any, linears: list[Linear], hidden: int) -> int:
    """Width of the feed-forward block: as configured, else the widest input of a projection back to the stream."""
    for key in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    back = [linear.in_features for linear in linears if linear.out_features == hidden]
    return max(back, default=4 * hidden)
