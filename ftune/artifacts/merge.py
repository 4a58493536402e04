"""Merging: fold what was trained into the base weights, write it, read it back, and compare.

The reference is the adapter model in fp32, over exactly the weights it was trained against. What is written is
loaded again from the disk and must give the reference's logits on real text; else nothing is left behind.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.tuned import load_plain, load_tuned
from ftune.errors import FtuneError, RunFailed
from ftune.methods._shared import is_4bit
from ftune.plan.resolve import Plan, resolve
from ftune.run.files import new_directory

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Divergence", "divergence", "merge"]

MAX_ERROR_FP32 = 1e-3
"""Largest difference of a logit that summation order explains (measured: 2e-6 to 2e-4)."""
MAX_KL_ROUNDED = 0.02
"""Largest mean divergence, in nats a token, that rounding the weights to 16 bits explains (measured: 2e-3)."""
TEXT_TOKENS = 512  # tokens of real text compared


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
        kl += float(F.kl_div(b_TV.log_softmax(-1), a_TV.log_softmax(-1), log_target=True, reduction="sum"))
        same += int((a_TV.argmax(-1) == b_TV.argmax(-1)).sum())
        count += a_TV.shape[0]
    return Divergence(worst, max(0.0, kl / count), same / count)


def merge(run: RunDir, out: Path | None = None, dtype: str | None = None) -> dict[str, Any]:
    """Merge a finished run into a plain transformers model.

    Args:
        run: A finished run.
        out: Where to write; default ``RUN/merged``. An older merge there is replaced.
        dtype: ``float32`` or ``bfloat16``; default: what the run computed in.

    Returns:
        The report: where, in which dtype, and the divergence from the adapter model and from the base.

    Raises:
        FtuneError: The method cannot be merged, or ``out`` holds something else.
        RunFailed: The merged model is not the one that was trained; nothing is left at ``out``.
    """
    recipe = run.recipe()
    method = recipe.method
    if not method.mergeable:
        raise FtuneError(
            f"a run of `{method.name}` cannot be merged",
            help=method.not_mergeable_because,
        )
    target = out or run.root / "merged"
    if target.exists() and not (target / "merge.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FtuneError(f"{target} exists and is no merged model", help="choose another --out")
    run.artifact(recipe)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FtuneError(f"cannot write to {target}: {error}", help="choose another --out") from error
    plan = resolve(recipe)
    texts = _texts(plan)
    saved_dtype: torch.dtype = getattr(torch, dtype or str(plan.context.dtype).removeprefix("torch."))

    model = _in_fp32(load_plain(plan))
    base_logits = _logits(model, texts)
    model = _in_fp32(load_tuned(model, plan, run))
    reference = _logits(model, texts)
    effect = divergence(reference, base_logits)
    del base_logits
    merged = cast(Any, method.merge(model, plan.context))
    merged.eval()
    in_memory = divergence(reference, _logits(merged, texts))
    _require_exact(in_memory, "the merged weights")

    with new_directory(target) as aside:
        merged.to(saved_dtype)
        merged.config.use_cache = True
        merged.save_pretrained(str(aside), max_shard_size="4GB")
        plan.tokenizer.save_pretrained(str(aside))
        del merged, model
        found = divergence(reference, _logits(_reload(aside, plan), texts))
        report = {
            "out": str(target),
            "dtype": str(saved_dtype).removeprefix("torch."),
            "tokens_compared": sum(len(text) for text in texts),
            "merge_error": in_memory.max_error,
            "merged_vs_adapter": asdict(found),
            "base_vs_adapter": asdict(effect),
            "bytes": sum(path.stat().st_size for path in aside.glob("*.safetensors")),
        }
        _judge(found, effect, saved_dtype)
        import json

        (aside / "merge.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _require_exact(found: Divergence, what: str) -> None:
    if not found.max_error <= MAX_ERROR_FP32:
        raise RunFailed(
            f"{what} are not the model that was trained: in fp32 a logit differs by {found.max_error:.3g} "
            f"(at most {MAX_ERROR_FP32:g} is rounding), KL {found.kl:.3g}; nothing was written"
        )


def _judge(found: Divergence, effect: Divergence, dtype: torch.dtype) -> None:
    """Fail unless what was read back from the disk is the trained model, up to rounding to its dtype."""
    if dtype == torch.float32:
        _require_exact(found, "the weights read back from the disk")
        return
    if not found.kl <= MAX_KL_ROUNDED:
        raise RunFailed(
            f"rounded to {dtype}, the merged model diverges from the adapter model by {found.kl:.3g} nats a token "
            f"(at most {MAX_KL_ROUNDED:g} is allowed); nothing was written",
            help="--dtype float32 keeps it exact",
        )
    if effect.kl > 0 and found.kl >= effect.kl:
        raise RunFailed(
            f"rounded to {dtype}, the merged model is no closer to the tuned model (KL {found.kl:.3g}) than the "
            f"base model is ({effect.kl:.3g}); nothing was written",
            help="--dtype float32 keeps what was trained",
        )


def _in_fp32(model: nn.Module) -> nn.Module:
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


def _reload(directory: Path, plan: Plan) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=torch.float32,
        attn_implementation=plan.recipe.model.attention,
        trust_remote_code=plan.recipe.model.trust_remote_code,
    )
    return cast("nn.Module", model.to(plan.context.device).eval())


def _texts(plan: Plan) -> list[list[int]]:
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


@torch.no_grad()
def _logits(model: nn.Module, texts: list[list[int]]) -> list[Tensor]:
    """Logits of each text, (tokens, vocabulary), fp32."""
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0].float().cpu() for text in texts
    ]
