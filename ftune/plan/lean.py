"""Give a model that is about to train the layers that keep less for the backward pass, where they compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ftune.methods import Context, Method

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["PER_DOCUMENT", "make_lean"]

PER_DOCUMENT = "per document"
"""How ``make_lean`` names attention without a mask."""

BOUND = {"float32": 1e-4, "bfloat16": 0.1}
"""Mean difference of logits, in their standard deviations, that rounding may make between two ways to compute
attention (0.04 in 30 layers of bfloat16). A document that sees another, or the future, makes several times as much."""


def make_lean(model: nn.Module, method: Method, context: Context, attention: str) -> dict[str, Any]:
    """Replace attention and layers in place.

    Args:
        model: The adapted model, in training mode.
        method: What adapted it; it knows its own layers.
        context: Device and dtype.
        attention: The implementation the model was built with.

    Returns:
        What was replaced: a count for each kind of layer, and ``attention``.
    """
    found: dict[str, Any] = dict(method.lean(model, context))
    found["attention"] = attention
    if method.attention(attention) == "sdpa" and _attend_by_document(model, context, method.packable):
        found["attention"] = PER_DOCUMENT
    return found


def _attend_by_document(model: Any, context: Context, packable: bool) -> bool:
    """Switch to attention per document, unless the logits of three documents then change."""
    import torch

    from ftune.methods.documents import register
    from ftune.ops.kernels import TRIAL_TOKENS

    ids = torch.arange(TRIAL_TOKENS, device=context.device) * 7919 % model.config.get_text_config().vocab_size
    documents = list(ids.split([9, TRIAL_TOKENS - 20, 11] if packable else TRIAL_TOKENS))
    before = _logits(model, documents, context)
    with_mask = model.config._attn_implementation
    try:
        model.set_attn_implementation(register())
        after = _logits(model, documents, context)
        same = _difference(after, before) <= BOUND[str(context.dtype).removeprefix("torch.")]
    except Exception:  # an architecture that handles masks itself; it fails in its own ways, and loses nothing
        same = False
    if not same:
        model.set_attn_implementation(with_mask)
    return same


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean() / other.std())


def _logits(model: nn.Module, documents: list[Tensor], context: Context) -> Tensor:
    """Logits (L, V) in fp32 of documents in one row."""
    import torch

    inputs = {"input_ids": torch.cat(documents)[None], "use_cache": False}
    if len(documents) > 1:
        places = [torch.arange(len(document), device=context.device) for document in documents]
        inputs["position_ids"] = torch.cat(places)[None]
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(context.device.type, dtype=context.dtype, enabled=context.dtype != torch.float32),
        ):
            return cast("Tensor", model(**inputs).logits[0]).float()
    finally:
        model.train(was_training)
