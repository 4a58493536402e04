"""Which implementation of attention a model is built with: asked of the architecture, before there are weights."""

from __future__ import annotations

import copy
from typing import Any, Literal, cast

from ftune.errors import ModelError
from ftune.methods import Method
from ftune.plan.defaults import Choice
from ftune.plan.shapes import build_on_meta
from ftune.recipe.schema import ModelSpec

Attention = Literal["sdpa", "eager", "flash_attention_2"]

__all__ = ["settle_attention"]


def settle_attention(spec: ModelSpec, method: Method, built: Any) -> tuple[Attention, tuple[Choice, ...]]:
    """The implementation that a run computes with, and what to tell of it.

    Args:
        spec: The recipe's model block; ``auto`` is ``sdpa`` where the architecture has it, else ``eager``.
        method: May bring an attention of its own in place of ``sdpa``.
        built: The model on the meta device, built as transformers builds it where no implementation is asked for.

    Raises:
        ModelError: The architecture has not what the recipe or the method asks for.
    """
    why_not = _why_no_sdpa(built)
    asked, kind = spec.attention, built.config.model_type
    if asked == "flash_attention_2" and not getattr(built, "_supports_flash_attn", True):
        raise ModelError(
            f"{kind} has no `attention: flash_attention_2`", help="leave out `attention` in the model block"
        )
    if asked == "sdpa" and why_not:
        raise ModelError(
            f"{kind} {why_not}, so `attention: sdpa` cannot be used",
            help="leave out `attention`, or set `attention: eager` in the model block",
        )
    settled: Attention = asked if asked != "auto" else "eager" if why_not else "sdpa"
    own = method.attention("sdpa")
    if own != "sdpa" and not _takes(built, own, spec, why_not):
        raise ModelError(
            f"`{cast(Any, method).name}` brings its own attention in place of sdpa, and {kind} "
            f"{why_not or 'computes sdpa in its own way'}",
            help="use `method: lora`, or `method: full`",
        )
    told = (Choice("model.attention", settled, f"{kind} {why_not}"),) if asked == "auto" and why_not else ()
    return settled, told


def _why_no_sdpa(built: Any) -> str | None:
    """Why an architecture cannot attend through ``sdpa``, or None."""
    if getattr(built.config.get_text_config(), "attn_logit_softcapping", None):
        return "caps its attention scores"
    return None if built.config._attn_implementation == "sdpa" else "has no sdpa"


def _takes(built: Any, implementation: str, spec: ModelSpec, why_not: str | None) -> bool:
    """Whether the architecture can be built with an implementation that is registered with transformers."""
    if why_not:
        return False
    try:
        build_on_meta(copy.deepcopy(built.config), trust_remote_code=spec.trust_remote_code, attention=implementation)
    except ModelError:
        return False
    return True
