"""Conversion: the trained update as a plain LoRA adapter, which every inference engine serves.

As with merging, what was written is read back over a fresh base model and compared with the tuned one on real
text. Where the update is low-rank by construction the two must agree; where it is not, the report says how far
the adapter is off.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ftune.artifacts.divergence import (
    MAX_ERROR_FP32,
    divergence,
    in_fp32,
    logits_of,
    require_exact,
    sample_texts,
    tuned_reference,
)
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.same_base import require_elsewhere, require_same_base
from ftune.artifacts.stops import stops_of_run, write_generation_config
from ftune.artifacts.tuned import Target, load_plain
from ftune.errors import FtuneError, RunFailed
from ftune.methods.adapter_files import load_peft, save_as_lora
from ftune.plan.resolve import resolve
from ftune.run.files import new_directory, require_writable, write_json

__all__ = ["to_lora"]


def to_lora(run: RunDir, out: Path | None = None, rank: int | None = None) -> dict[str, Any]:
    """Write what a finished run trained as a plain LoRA adapter.

    Args:
        run: A finished run.
        out: Where to write; default ``RUN/lora``. An older conversion there is replaced.
        rank: Rank of the adapter; default: the least that is exact, or the method's choice.

    Returns:
        The report: where, of which rank, and the divergence from the tuned model and of the base from it.

    Raises:
        FtuneError: The method's update is no LoRA, or ``out`` holds something else.
        RunFailed: The adapter is not what was trained; nothing is left at ``out``.
    """
    recipe = run.recipe()
    method = recipe.method
    if method.as_lora is None:
        raise FtuneError(f"a run of `{method.name}` cannot be converted to LoRA", help=method.not_lora_because)
    if method.as_lora == "already":
        raise FtuneError(f"a run of `{method.name}` is plain LoRA already", help=f"{run.root}/adapter loads as it is")
    usual = run.root / "lora"
    target = out or usual
    run.artifact(recipe)
    require_same_base(run, recipe)
    require_elsewhere(target, run, recipe, "--out", usual)
    require_writable(target, "convert.json", "converted adapter")
    plan = resolve(recipe)
    texts = sample_texts(plan)

    model, reference, effect = tuned_reference(plan, Target(plan.recipe, run), texts)
    factors = method.to_lora(model, rank)
    del model

    with new_directory(target) as aside:
        base = in_fp32(load_plain(plan))
        used = save_as_lora(factors, base, aside, plan.context)
        plan.tokenizer.save_pretrained(str(aside))
        write_generation_config(aside, base, plan.tokenizer, stops_of_run(run, plan))
        found = divergence(reference, logits_of(load_peft(base, aside).eval(), texts))
        exact = method.as_lora == "exact" and (rank is None or found.max_error <= MAX_ERROR_FP32)
        if exact:
            require_exact(found, "the LoRA matrices")
        elif found.kl >= effect.kl:
            raise RunFailed(
                f"at rank {used} the LoRA adapter is no closer to the tuned model (KL {found.kl:.3g}) than the base "
                f"model is ({effect.kl:.3g}); nothing was written",
                help="ask for a higher --rank, or merge the run instead",
            )
        report = {
            "out": str(target),
            "rank": used,
            "rank_asked_for": rank,
            "exact": exact,
            "quantized_base": method.base_quantization is not None,
            "tokens_compared": sum(len(text) for text in texts),
            "lora_vs_tuned": asdict(found),
            "base_vs_tuned": asdict(effect),
            "bytes": sum(path.stat().st_size for path in aside.glob("*.safetensors")),
        }
        write_json(aside / "convert.json", report)
    return report
