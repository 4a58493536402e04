"""Which part of a model is the language model, and which of its parameters are for training at all.

Of a model of several kinds of input (images and text) the language model alone is adapted: rows are text, so nothing
else computes. It is the part that is built by the text configuration, and the output head.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fixed_parameters", "in_language_model", "language_prefixes", "reads_weight"]


def language_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are the language model, each with a dot behind it; ``""`` where all of it is.

    Args:
        model: A transformers model, without adapters.
    """
    from transformers import PreTrainedModel

    whole = cast(Any, model)
    text = whole.config.get_text_config(decoder=True)
    if text is whole.config:
        return ("",)
    found = [
        name
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    head = whole.get_output_embeddings()
    found += [name for name, module in model.named_modules() if module is head]
    return tuple(f"{name}." for name in found) or ("",)


def in_language_model(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a module or parameter of this name is part of it."""
    return f"{name}.".startswith(prefixes)


def fixed_parameters(model: nn.Module) -> frozenset[str]:
    """Names of parameters that no method trains: outside the language model, or held still by the architecture.

    Some parameters are no weights to train (a router's balance, which training adjusts in another way): their
    architecture makes them so that they require no gradient. That is lost when weights are loaded, so a model of the
    same configuration, without weights, is asked.

    Args:
        model: A transformers model, without adapters.
    """
    import torch

    prefixes = language_prefixes(model)
    names = [name for name, _ in model.named_parameters()]
    if any(parameter.is_meta for parameter in model.parameters()):
        built = model
    else:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = type(model)(copy.deepcopy(cast(Any, model).config))
    still = {name for name, parameter in built.named_parameters() if not parameter.requires_grad}
    return frozenset(name for name in names if name in still or not in_language_model(name, prefixes))


@functools.cache
def reads_weight(parent: type, leaf: str) -> bool:
    """Whether a module's code reads the weight of one of its layers itself, past whatever stands beside the layer.

    Mamba's kernels take the weights of projections: an adapter beside one of them would train and change nothing.
    """
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"\bself\.{re.escape(leaf)}\.weight\b(?!\.(?:dtype|device)\b)", source) is not None
