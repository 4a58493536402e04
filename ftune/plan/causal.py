"""Whether a base model is a causal language model: one whose logits for a token depend on no later token.

Three looks, none at a list of architectures. What config.json says the weights are is looked up in transformers' own
tables. A small model of the same configuration is asked whether a later token changes an earlier logit. Where none can
be made, the loaded model is asked, before it trains.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftune.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "refuse_other_kinds",
    "require_causal",
    "sees_later_tokens",
    "small_config",
    "small_model",
    "small_sees_later_tokens",
]

MAX_SMALL = 30_000_000
"""Parameters of the small model, above which it is not made: that would cost more than a second."""
LEAK = {4: 1e-3, 2: 5e-2}
"""Share of a later token's effect on its own logits that rounding explains at earlier ones, by bytes of the dtype."""
PREFIX, LENGTH = 6, 9  # tokens that two rows share, and have
_LANGUAGE_MODELS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")
_HELP = "take a decoder that was trained to predict the next token (`...ForCausalLM` in its config.json)"


def refuse_other_kinds(config: Any, name: str) -> None:
    """Refuse a model that its configuration says is none for text generation.

    Args:
        config: A transformers configuration.
        name: The model's, for messages.

    Raises:
        ModelError: Says what it is.
    """
    from transformers.models.auto import modeling_auto

    own = getattr(config, "auto_map", None)
    if isinstance(own, dict) and "AutoModelForCausalLM" in own:
        return  # the model's own code says what it is
    tables = {
        table.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): names
        for table, names in vars(modeling_auto).items()
        if table.startswith("MODEL_FOR_") and table.endswith("_MAPPING_NAMES")
    }
    named = getattr(config, "architectures", None)
    saved_as = [str(architecture) for architecture in (named if isinstance(named, list) else [named] if named else [])]
    kinds = [kind for kind, names in tables.items() if _classes(names).intersection(saved_as)]
    generates = any(config.model_type in tables[kind] for kind in _LANGUAGE_MODELS if kind in tables)
    what = f"`{saved_as[0]}`" if saved_as else f"of type `{config.model_type}`"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"`{name}` is an encoder-decoder ({what}), not a causal language model", help=_HELP)
    if kinds and not set(kinds).intersection(_LANGUAGE_MODELS):
        purpose = kinds[-1].lower().replace("_", " ").replace(" lm", " language modelling")
        raise ModelError(f"`{name}` is a model for {purpose} ({what}), not a causal language model", help=_HELP)
    if not generates and config.model_type in modeling_auto.MODEL_MAPPING_NAMES:
        raise ModelError(f"`{name}` is {what}, and transformers has no causal language model of that type", help=_HELP)


def _classes(names: Any) -> set[str]:
    """All class names of one of transformers' tables, whose entries are one or several."""
    return {name for entry in names.values() for name in ([entry] if isinstance(entry, str) else entry)}


def require_causal(leaks: bool | None, name: str) -> None:
    """Refuse a model in which a later token changes an earlier logit.

    Raises:
        ModelError: It does.
    """
    if leaks:
        raise ModelError(
            f"`{name}` is not causal: a later token changes the logits of earlier ones, so in training it would see "
            "what it is to predict",
            help=f"{_HELP}; of a decoder, correct what makes it bidirectional in config.json (`is_causal`, "
            "`use_bidirectional_attention`, `is_decoder`)",
        )


def sees_later_tokens(model: nn.Module) -> bool | None:
    """Whether a later token changes an earlier logit; None where the logits are not finite.

    Args:
        model: A language model of transformers, anywhere but on the meta device; left in the mode it was in.
    """
    import torch

    whole: Any = model
    device, training = whole.get_input_embeddings().weight.device, model.training
    vocab = int(whole.get_input_embeddings().weight.shape[0])
    ids = torch.arange(LENGTH, device=device).mul(7).add(3).remainder(vocab).repeat(2, 1)
    ids[1, PREFIX:] = (ids[1, PREFIX:] + 5) % vocab
    try:
        with torch.no_grad():
            logits = whole.eval()(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)
    change = (logits[0] - logits[1]).abs().amax(-1)
    if not bool(torch.isfinite(change).all()):
        return None
    bound = LEAK[min(4, whole.get_input_embeddings().weight.element_size())]
    return bool(change[:PREFIX].max() > bound * change[PREFIX:].max())


def small_sees_later_tokens(config: Any) -> bool | None:
    """The same of a small random model with a configuration's kinds of layers; None where none can be made.

    Args:
        config: A configuration of an architecture of transformers' own; it is not changed.
    """
    try:
        with small_model(small_config(config)) as model:
            return None if model is None else sees_later_tokens(model)
    except Exception:
        # Sizes that do not go together, in one of many ways: the loaded model is asked instead.
        return None


@contextlib.contextmanager
def small_model(small: Any) -> Iterator[nn.Module | None]:
    """A random float32 model whose attention shows in its logits; None where it would be no small one.

    While it is in use, no random number is taken from the caller's and no warning is shown.

    Args:
        small: As ``small_config`` gives it. Where its sizes do not go together, anything may be raised.
    """
    import warnings

    import torch

    from ftune.plan.shapes import auto_class

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            hollow = auto_class(small).from_config(small, trust_remote_code=False)
        if sum(parameter.numel() for parameter in hollow.parameters()) > MAX_SMALL:
            yield None
            return
        torch.manual_seed(0)
        model = auto_class(small).from_config(small, trust_remote_code=False, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
        yield model


def small_config(config: Any) -> Any:
    """A configuration with one layer of each kind and few heads, features, experts and tokens."""
    small = copy.deepcopy(config)
    small.quantization_config = None
    del small.quantization_config
    text = small.get_text_config()
    layers, heads, hidden = int(text.num_hidden_layers), int(text.num_attention_heads), int(text.hidden_size)
    kinds = list(getattr(text, "layer_types", None) or [])
    kept = sorted({kinds.index(kind) for kind in kinds}) or list(range(min(2, layers)))
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, [value[index] for index in kept])
        elif isinstance(value, int) and not isinstance(value, bool):
            if key.endswith(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size_mlp")):
                setattr(text, key, min(value, 64))
            elif key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
                setattr(text, key, min(value, 4))
            elif key in ("num_experts_per_tok", "moe_k", "top_k_experts"):
                setattr(text, key, min(value, 2))
            elif key in ("n_group", "topk_group", "n_shared_experts"):
                setattr(text, key, 1)
            elif key.startswith("vocab_size"):
                setattr(text, key, min(value, 64))
            elif key.endswith("token_id"):
                setattr(text, key, value % 64)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    few = min(heads, 4)
    text.num_hidden_layers = len(kept)
    text.num_attention_heads = few
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = few if kv_heads == heads else min(kv_heads, few // 2 or 1)
    text.hidden_size = few * int(getattr(text, "head_dim", None) or hidden // heads)
    return small
