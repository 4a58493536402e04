"""Whether an architecture keeps documents that share a row apart, tried on a small random model of it.

Recurrent layers, and positions that a model counts for itself, ignore where a document begins. That is a property of
the code and not of the weights, so a model of the same configuration with few, narrow layers shows it, before
weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ftune.errors import ModelError
from ftune.ops.kernels import TRIAL_TOKENS
from ftune.plan.defaults import Choice
from ftune.recipe.schema import ModelSpec, Recipe

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["apart", "keeps_documents_apart", "may_keep_apart", "packing_error", "settle_packing"]

MOST_PARAMETERS = 60_000_000
"""Of a model that is made for the trial: 240 MB."""
MOST_SECONDS = 5.0
"""Of the trial: some recurrent layers are slow without their kernels."""
VOCABULARY = 256
LAYERS = 8
"""Layers of the trial's model: some architectures have attention in every so many-th alone."""

_known: dict[tuple[str, str], bool | None] = {}


def may_keep_apart(config: Any, recipe: Recipe) -> bool:
    """Whether nothing is known against documents behind each other in a row."""
    return keeps_documents_apart(config, recipe.model) is not False


def keeps_documents_apart(config: Any, spec: ModelSpec) -> bool | None:
    """Whether a document's logits are the same alone and behind another one.

    Args:
        config: A configuration of transformers; it is not changed.
        spec: The recipe's model block, with the implementation of attention settled. Flash attention cannot be tried
            everywhere: sdpa stands for it.

    Returns:
        None where no small model of this architecture could be made and tried.
    """
    key = (config.to_json_string(use_diff=False), spec.attention)
    if key not in _known:
        tried = (_try(small, spec.attention, spec.trust_remote_code) for small in _small(config))
        _known[key] = next((found for found in tried if found is not None), None)
    return _known[key]


def settle_packing(recipe: Recipe, config: Any) -> tuple[bool, tuple[Choice, ...]]:
    """Whether documents share rows, and what to tell of it.

    Args:
        recipe: As it was written, with the implementation of attention settled.
        config: Its model's configuration.

    Raises:
        ModelError: The recipe asks for shared rows, and this architecture does not keep documents apart in them.
    """
    if not recipe.packing:
        return False, ()
    found = keeps_documents_apart(config, recipe.model)
    if recipe.data.packing is True:
        if found is False:
            raise ModelError(
                f"{config.model_type} does not keep documents apart that share a row: with `packing: true` each would "
                "see the one before it",
                help="leave out `data.packing`, or set it to false",
            )
        return True, ()
    if found:
        return True, ()
    why = "mixes documents that share a row" if found is False else "may mix documents that share a row: not tried"
    return False, (Choice("data.packing", False, f"{config.model_type} {why}"),)


def apart(leak: float, shift: float, rounding: float) -> bool:
    """Whether what ``packing_error`` found is rounding."""
    return leak <= 1e-4 and shift <= 4 * rounding + 1e-4


@torch.no_grad()
def packing_error(model: nn.Module, dtype: torch.dtype, device: torch.device, vocab: int) -> tuple[float, float, float]:
    """How much a packed document depends on its neighbour, and on standing behind it.

    Args:
        model: A causal model; left in training mode if it was.
        dtype: What it computes in.
        device: Where it is.
        vocab: Size of its vocabulary, from which three short documents are made.

    Returns:
        Mean changes of one document's logits, as shares of their standard deviation: when the document before it is
        another one (same shapes, so 0 where documents are isolated); when there is none before it; and, as the
        measure of rounding between these shapes, when it stands first in a row of that length.
    """
    length = TRIAL_TOKENS // 6  # three rows of two documents, or six of one
    ids = torch.arange(3 * length, device=device) * 7919 % vocab
    first, other, probe = ids.chunk(3)
    places = torch.arange(length, device=device)

    def logits(rows: list[list[Tensor]]) -> Tensor:
        """Logits (B, L, V) of rows of documents, as many and as long in each row."""
        inputs: dict[str, Any] = {"input_ids": torch.stack([torch.cat(row) for row in rows]), "use_cache": False}
        if len(rows[0]) > 1:
            inputs["position_ids"] = torch.cat([places] * len(rows[0])).repeat(len(rows), 1)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            found: Tensor = model(**inputs).logits.float()
        return found

    was_training = model.training
    model.eval()
    try:
        # In one batch: a forward pass costs as much for three short rows as for one.
        packed = logits([[first, probe], [other, probe], [probe, other]])
        behind, behind_other, in_front = packed[0, length:], packed[1, length:], packed[2, :length]
        alone = logits([[probe]] * 6)[0]
    finally:
        model.train(was_training)
    spread = alone.std()
    leak, shift, rounding = ((a - b).abs().mean() / spread for a, b in
                             ((behind, behind_other), (behind, alone), (in_front, alone)))  # fmt: skip
    return float(leak), float(shift), float(rounding)


def _try(config: Any, attention: str, trust_remote_code: bool) -> bool | None:
    from ftune.plan.shapes import auto_class, build_on_meta

    attention = attention if attention == "eager" else "sdpa"
    try:
        size = sum(
            p.numel() for p in build_on_meta(copy.deepcopy(config), trust_remote_code=trust_remote_code).parameters()
        )
        if size > MOST_PARAMETERS:
            return None
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = auto_class(config).from_config(
                config, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
            )
            # Random weights are small: a document that sees another one must show beside the residual stream.
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.data.mul_(3)
            with _within(model, MOST_SECONDS):
                error = packing_error(model, torch.float32, torch.device("cpu"), VOCABULARY)
    except Exception:  # sizes that do not go together, and whatever else an architecture asks of its configuration
        return None
    return None if error != error else apart(*error)


@contextlib.contextmanager
def _within(model: nn.Module, seconds: float) -> Iterator[None]:
    """Stop a forward pass at the first module that begins after so many seconds of this thread on a CPU.

    Not by the clock: what else the machine does would decide, and otherwise in each process of a run.

    Raises:
        TimeoutError: It took longer.
    """
    end = time.thread_time() + seconds

    def in_time(*_: Any) -> None:
        if time.thread_time() > end:
            raise TimeoutError

    for module in model.modules():
        module.register_forward_pre_hook(in_time)
    yield


# --- small models of an architecture ----------------------------------------------------------------------------

# Sizes by their names in transformers' configurations, and what they are lowered to.
_LOWERED = {
    64: (
        "intermediate_size",
        "intermediate_size_mlp",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "shared_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "ffn_dim",
        "ffn_hidden_size",
        "n_inner",
    ),
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    16: (
        "chunk_size",
        "mamba_chunk_size",
        "mamba_d_state",
        "state_size",
        "ssm_state_size",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
    ),
    8: ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    4: ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    2: (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "top_k",
        "linear_num_key_heads",
        "linear_num_value_heads",
    ),
    1: ("n_group", "topk_group", "n_groups", "mamba_n_groups", "mamba_ngroups"),
    0: ("pad_token_id", "bos_token_id", "eos_token_id", "num_kv_shared_layers"),
}
_AS_HIDDEN = ("mamba_d_ssm", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "lru_width", "kv_channels")
"""Sizes that keep their ratio to the width of the residual stream."""
_HEAD_DIM = 8


def _small(config: Any) -> Iterator[Any]:
    """The configuration with few layers, narrow feed-forwards and few experts: with a narrow stream, and without."""
    for narrow, layers in ((True, LAYERS), (False, 2)):
        small = copy.deepcopy(config)
        text = small.get_text_config()
        try:
            _shorten(text, layers)
            for most, names in _LOWERED.items():
                for name in names:
                    _lower(text, name, most)
            if narrow:
                _narrow(text)
            for name in small.sub_configs:
                if (part := getattr(small, name, None)) is not None and part is not text:
                    _lower(part, "depth", 1)
                    _lower(part, "num_hidden_layers", 1)
        except Exception:  # a configuration that checks what is written into it
            continue
        yield small


def _lower(config: Any, name: str, most: int) -> None:
    """Lower a size, where the configuration has it."""
    value = getattr(config, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > most:
        setattr(config, name, most)


def _shorten(text: Any, layers: int) -> None:
    """Keep the first layers, and more of them where a kind of layer comes later."""
    of = int(text.num_hidden_layers)
    each = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, list | str | tuple) and len(value) == of and not name.startswith("_")
    }
    firsts = [[str(kind) for kind in value].index(str(kind)) for value in each.values() for kind in value]
    keep = min(of, max([layers, *(first + 1 for first in firsts)]))
    for name, value in each.items():
        setattr(text, name, value[:keep])
    text.num_hidden_layers = keep


def _narrow(text: Any) -> None:
    """Narrow the residual stream: as many heads, of a few numbers each; a sixteenth where there are none."""
    before, heads = int(text.hidden_size), getattr(text, "num_attention_heads", None)
    text.hidden_size = _HEAD_DIM * heads if heads else max(16, before // 16)
    for name in ("head_dim", "rotary_dim"):
        if heads and getattr(text, name, None):
            with contextlib.suppress(AttributeError):  # derived from the others
                setattr(text, name, _HEAD_DIM)
    for name in (*_AS_HIDDEN, *(() if heads else ("num_heads",))):
        value = getattr(text, name, None)
        if isinstance(value, int):
            setattr(text, name, max(1, value * text.hidden_size // before))
