"""Merging: fold what was trained into the base weights, write it, read it back, and compare.

The reference is the adapter model in fp32, over exactly the weights it was trained against. What is written is
loaded again from the disk and must give the reference's logits on real text; else nothing is left behind.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ftune.artifacts.by_shard import merge_by_shard
from ftune.artifacts.divergence import (
    Divergence,
    divergence,
    logits_of,
    require_exact,
    sample_texts,
    tuned_reference,
)
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.same_base import require_elsewhere, require_same_base
from ftune.artifacts.stops import stops_of_run, write_generation_config
from ftune.artifacts.tuned import at_checkpoint, scaled
from ftune.available import available_bytes
from ftune.errors import DataError, FtuneError, RunFailed
from ftune.methods.scaled import base_weights, interpolated
from ftune.models.whole import without_generation_config
from ftune.plan.base_model import choose_device, configured
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.plan.shapes import auto_class, read_shape
from ftune.recipe.schema import Recipe
from ftune.run.files import new_directory, require_writable

if TYPE_CHECKING:
    from torch import nn

__all__ = ["fits_in_memory", "merge", "reload"]

MAX_KL_ROUNDED = 0.02
"""Largest mean divergence, in nats a token, that rounding the weights to 16 bits explains (measured: 2e-3)."""


BYTES_A_PARAMETER = 6
"""What a merge in memory takes at its peak for each parameter: the model in fp32, and half of it on the way."""
BYTES_SCALED = 4
"""What it takes besides where the change is scaled: the weights before training."""
RUNTIME_BYTES = 2**30
"""What the libraries take, and the logits that are compared."""


def merge(
    run: RunDir,
    out: Path | None = None,
    dtype: str | None = None,
    by_shard: bool | None = None,
    *,
    checkpoint: str | None = None,
    scale: float = 1.0,
) -> dict[str, Any]:
    """Merge a run into a plain transformers model.

    Args:
        run: A finished run, or one with the checkpoint.
        out: Where to write; default ``RUN/merged``. An older merge there is replaced.
        dtype: ``float32`` or ``bfloat16``; default: what the run computed in.
        by_shard: Never hold the whole model; None: only where it would not fit comfortably, or the
            run's data are not there any more.
        checkpoint: One of the run's checkpoints in place of its end: ``step-40`` or ``40``.
        scale: How much of the change is merged, above 0 and at most 1: each weight is W0 + scale (W - W0), in fp32.

    Returns:
        The report: where, in which dtype, and the divergence from the adapter model and from the base.

    Raises:
        FtuneError: The method cannot be merged, there is no such checkpoint, or ``out`` holds something else.
        RunFailed: The merged model is not the one that was trained; nothing is left at ``out``.
    """
    recipe = run.recipe()
    method = recipe.method
    if not method.mergeable:
        raise FtuneError(
            f"a run of `{method.name}` cannot be merged",
            help=method.not_mergeable_because,
        )
    usual = run.root / "merged"
    where = out or usual
    target = scaled(at_checkpoint(run, recipe, checkpoint), scale)
    if checkpoint is None:
        run.artifact(recipe)
    require_same_base(run, recipe)
    require_elsewhere(where, run, recipe, "--out", usual)
    require_writable(where, "merge.json", "merged model")
    if by_shard if by_shard is not None else not fits_in_memory(recipe, scale):
        return merge_by_shard(target, where, dtype)
    try:
        plan = resolve(recipe)
    except DataError:
        if by_shard is not None:
            raise
        # A run that was handed on without its data: that way compares layers, not logits on them.
        return merge_by_shard(target, where, dtype)
    texts = sample_texts(plan)
    saved_dtype: torch.dtype = getattr(torch, dtype or str(plan.context.dtype).removeprefix("torch."))

    model, reference, effect = tuned_reference(plan, replace(target, recipe=plan.recipe), texts)
    before = base_weights(model) if scale < 1 and method.artifact == "adapter" else {}
    merged = cast(Any, method.merge(model, plan.context))
    merged.eval()
    for name, weight in before.items():
        parameter = merged.get_parameter(name)
        parameter.data.copy_(interpolated(weight.to(parameter.device), parameter, scale))
    del before
    in_memory = divergence(reference, logits_of(merged, texts))
    require_exact(in_memory, "the merged weights")

    with new_directory(where) as aside:
        merged.to(saved_dtype)
        merged.config.use_cache = True
        with without_generation_config(merged, aside):
            merged.save_pretrained(str(aside), max_shard_size="4GB")
        plan.tokenizer.save_pretrained(str(aside))
        write_generation_config(aside, merged, plan.tokenizer, stops_of_run(run, plan))
        del merged, model
        found = divergence(reference, logits_of(reload(aside, plan), texts))
        report = {
            "out": str(where),
            "checkpoint": target.checkpoint.name if target.checkpoint else None,
            "scale": scale,
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


def fits_in_memory(recipe: Recipe, scale: float) -> bool:
    """Whether the model can be merged in memory, with room to spare."""
    spec = recipe.model
    shape = read_shape(configured(spec, recipe.method), trust_remote_code=spec.trust_remote_code)
    needed = (BYTES_A_PARAMETER + BYTES_SCALED * (scale < 1)) * shape.parameters + RUNTIME_BYTES
    return needed <= available_bytes(choose_device().type)


def _judge(found: Divergence, effect: Divergence, dtype: torch.dtype) -> None:
    """Fail unless what was read back from the disk is the trained model, up to rounding to its dtype."""
    if dtype == torch.float32:
        require_exact(found, "the weights read back from the disk")
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


def reload(directory: Path, plan: Plan) -> nn.Module:
    """A whole model as transformers loads it from a directory, in fp32, in evaluation mode."""
    recipe = plan.recipe
    model = auto_class(configured(recipe.model, recipe.method)).from_pretrained(
        str(directory),
        dtype=torch.float32,
        attn_implementation=plan.recipe.model.attention,
        trust_remote_code=plan.recipe.model.trust_remote_code,
    )
    return cast("nn.Module", model.to(plan.context.device).eval())
