"""Whether a run's base model is still the one that it was trained on."""

from __future__ import annotations

from typing import Any

from ftune.artifacts.run_dir import RunDir
from ftune.errors import RunDirError
from ftune.plan.fingerprint import fingerprint
from ftune.recipe.schema import ModelSpec, Recipe

__all__ = ["base_of", "is_moved", "require_same_base"]


def base_of(record: dict[str, Any]) -> str | None:
    """The fingerprint of its base in ``run.json``; None of a model of the hub, and in runs of older versions."""
    found: Any = record
    for key in ("plan", "model", "fingerprint"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def is_moved(now: ModelSpec, then: ModelSpec, record: dict[str, Any]) -> bool:
    """Whether two model blocks differ in the path alone, and the same files lie at the new one."""
    known = base_of(record)
    if known is None or now.id == then.id or now != then.model_copy(update={"id": now.id}):
        return False
    return fingerprint(now) == known


def require_same_base(run: RunDir, recipe: Recipe) -> None:
    """Hold that a run's base on this disk has the weights that it was trained on.

    Args:
        run: A run.
        recipe: Its recipe, as resolved.

    Raises:
        RunDirError: There are others now.
        ModelError: There is no model now.
    """
    known = base_of(run.read())
    if known is not None and fingerprint(recipe.model) != known:
        raise RunDirError(
            f"{run.root} was trained on other weights, or another config.json, than `{recipe.model.id}` holds now",
            help="put the base model back as it was, or train the recipe again with --overwrite",
        )
