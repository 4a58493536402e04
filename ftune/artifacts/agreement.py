"""What every process of a run must find the same before it trains."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.run_dir import package_versions
from ftune.plan.base_model import gguf_path
from ftune.recipe.locate import locate_model

if TYPE_CHECKING:
    from ftune.plan.plan import Plan
    from ftune.recipe.schema import Recipe

__all__ = ["facts_of"]

SAMPLE = 2**20
"""Bytes read at each end of a file of weights: whole ones would take minutes."""

_READ = (".json", ".safetensors", ".jinja")
"""Files that a model or its tokenizer is made of; a note beside them may differ."""


def facts_of(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """Recipe, data, model and libraries of this process, by what they are called in a message.

    Args:
        plan: Made by this process from the files that it sees.
        recipe: Which the run is in.
    """
    train, held_out = plan.splits.train, plan.splits.eval
    return {
        **{f"the recipe's `{name}`": value for name, value in recipe.model_dump(mode="json").items()},
        "the training data": train.fingerprint,
        "the held-out data": held_out.fingerprint if held_out else None,
        "the steps of the run": [plan.total_steps, plan.warmup_steps, plan.global_batch],
        "the base model's files": _model_files(plan),
        "the installed libraries": package_versions(),
    }


def _model_files(plan: Plan) -> list[str]:
    """A sample of each; of a model of the hub, whose commit the recipe has, none."""
    located = locate_model(plan.recipe.model)
    if located.kind == "hub":
        return []
    if located.kind == "gguf":
        return [_sample(gguf_path(located))]
    files = sorted(path for path in Path(located.path_or_id).iterdir() if path.suffix in _READ)
    return [_sample(path) for path in files]


def _sample(path: Path) -> str:
    """A digest of a file's name and size and of its first and last MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{path.name} {size}".encode())
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE))
        file.seek(max(0, size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return digest.hexdigest()
