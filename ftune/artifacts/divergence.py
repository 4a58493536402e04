"""How far two models are apart: their logits in fp32 on real text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.artifacts.tuned import Target, load_plain, load_target
from ftune.errors import RunFailed
from ftune.models.quantization import is_4bit
from ftune.plan.plan import Plan

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "MAX_ERROR_FP32",
    "Divergence",
    "divergence",
    "in_fp32",
    "logits_of",
    "require_exact",
    "sample_texts",
    "tuned_reference",
]

MAX_ERROR_FP32 = 1e-3
"""Largest difference of a logit that summation order explains (measured: 2e-6 to 2e-4)."""
TEXT_TOKENS = 512  # tokens of real text compared
KL_ROWS = 64  # tokens at a time: a large vocabulary in fp64 is a megabyte a token


@dataclass(frozen=True)
class Divergence:
    """How far one model's next-token distributions are from a reference's, over real text.

    Attributes:
        max_error: Largest absolute difference of two logits.
        kl: Mean KL divergence KL(reference || model), in nats a token.
        top1: Share of positions with the same most likely token.
    """

    max_error: float
    kl: float
    top1: float


def divergence(reference: list[Tensor], other: list[Tensor]) -> Divergence:
    """Compare logits of shape (tokens, vocabulary), text by text."""
    worst, kl, same, count = 0.0, 0.0, 0, 0
    for a_TV, b_TV in zip(reference, other, strict=True):
        worst = max(worst, float((a_TV - b_TV).abs().max()))
        for a_BV, b_BV in zip(torch.split(a_TV, KL_ROWS), torch.split(b_TV, KL_ROWS), strict=True):
            # fp64: below 1e-7 or so what fp32 gives is rounding, of either sign, and hides that training had an effect.
            a_BV, b_BV = a_BV.double().log_softmax(-1), b_BV.double().log_softmax(-1)
            kl += float(F.kl_div(b_BV, a_BV, log_target=True, reduction="sum"))
        same += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        count += a_TV.shape[0]
    return Divergence(worst, max(0.0, kl / count), same / count)


def require_exact(found: Divergence, what: str) -> None:
    """Hold that two fp32 models are one.

    Raises:
        RunFailed: A logit differs by more than rounding explains.
    """
    if not found.max_error <= MAX_ERROR_FP32:
        raise RunFailed(
            f"{what} are not the model that was trained: in fp32 a logit differs by {found.max_error:.3g} "
            f"(at most {MAX_ERROR_FP32:g} is rounding), KL {found.kl:.3g}; nothing was written"
        )


def in_fp32(model: nn.Module) -> nn.Module:
    """Compute in fp32 on the weights as they are: exact for 16-bit ones, dequantized on the fly for 4-bit ones."""
    # transformers' own float() refuses quantized models; torch's casts the floating parts and leaves packed ones.
    torch.nn.Module.float(model).eval()
    for module in model.modules():
        if is_4bit(module):
            layer = cast(Any, module)
            layer.compute_dtype = torch.float32
            # Whoever dequantizes (DoRA's norms, the merge) gets the codes times their scales, not rounded again.
            layer.weight.quant_state.dtype = torch.float32
    return model


def sample_texts(plan: Plan) -> list[list[int]]:
    """Real text, held-out where there is some: ``TEXT_TOKENS`` tokens of the first examples."""
    split = plan.splits.eval or plan.splits.train
    texts: list[list[int]] = []
    left = TEXT_TOKENS
    for example in split.examples:
        if left < 2:
            break
        texts.append(example.input_ids[:left].tolist())
        left -= len(texts[-1])
    return texts


def tuned_reference(plan: Plan, target: Target, texts: list[list[int]]) -> tuple[nn.Module, list[Tensor], Divergence]:
    """The tuned model in fp32, its logits, and how far its base is from it."""
    model = in_fp32(load_plain(plan))
    base_logits = logits_of(model, texts)
    model = in_fp32(load_target(model, target, plan.context))
    reference = logits_of(model, texts)
    return model, reference, divergence(reference, base_logits)


@torch.no_grad()
def logits_of(model: nn.Module, texts: list[list[int]]) -> list[Tensor]:
    """Logits of each text, (tokens, vocabulary), fp32."""
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0].float().cpu() for text in texts
    ]
