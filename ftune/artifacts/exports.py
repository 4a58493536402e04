"""Whether what a run leaves behind merges, and loads without ftune: found out by doing it. Nothing is written."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ftune.artifacts.divergence import MAX_ERROR_FP32, divergence, in_fp32, logits_of, sample_texts
from ftune.artifacts.merge import fits_in_memory, reload
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.tuned import load_plain, load_tuned
from ftune.methods.adapter_files import load_peft
from ftune.plan.resolve import resolve

__all__ = ["check_exports"]


def check_exports(run: RunDir) -> dict[str, dict[str, Any]]:
    """Compare the tuned model of a finished run with the merged one, and with what a library loads by itself.

    Returns:
        ``merge`` and ``load``, the latter with the name of the ``library``: ``error``, the largest difference of a
        logit on real text, in fp32, as ``ftune merge`` tells it; ``why``, where there is none, or where it is more
        than rounding.

    Raises:
        FtuneError: The run is not finished, or its data or its model are not there.
    """
    recipe = run.recipe()
    method, artifact = recipe.method, run.artifact(recipe)
    if not fits_in_memory(recipe, scale=1.0):
        why = "not checked: the model in fp32 does not fit in memory"
        return {"merge": _found(None, why), "load": _found(None, why) | {"library": method.saved_as}}
    plan = resolve(recipe)
    texts = sample_texts(plan)
    model = in_fp32(load_tuned(in_fp32(load_plain(plan)), plan, run))
    reference = logits_of(model, texts)

    def against(other: torch.nn.Module) -> dict[str, Any]:
        return _found(divergence(reference, logits_of(other.eval(), texts)).max_error)

    merged = (
        against(method.merge(model, plan.context)) if method.mergeable else _found(None, method.not_mergeable_because)
    )
    del model
    if method.saved_as == "ftune":
        loaded = _found(None, "its layers are ftune's own: no other library builds them")
    elif method.saved_as == "transformers":
        loaded = against(reload(artifact, plan))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's doubts (VeRA's random matrices) are what is settled here
            loaded = against(in_fp32(load_peft(in_fp32(load_plain(plan)), artifact)))
    return {"merge": merged, "load": loaded | {"library": method.saved_as}}


def _found(error: float | None, why: str | None = None) -> dict[str, Any]:
    if error is not None and not error <= MAX_ERROR_FP32:
        why = f"a logit differs by {error:.2g}, which is more than rounding"
    return {"error": error, "why": why}
