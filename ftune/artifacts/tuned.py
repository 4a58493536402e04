"""A model as a run left it, or as it was before: loaded once, for evaluation, chat and merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.same_base import is_moved, require_same_base
from ftune.errors import RunDirError
from ftune.plan.base_model import choose_device, load_base, load_config
from ftune.plan.precision import choose_dtype
from ftune.plan.quantized import as_stored
from ftune.plan.resolve import Plan, written_out
from ftune.recipe import load_checked
from ftune.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Target", "find_target", "load_plain", "load_tuned", "reading"]


@dataclass(frozen=True)
class Target:
    """What a command was pointed at: a recipe, and its finished run where there is one."""

    recipe: Recipe
    run: RunDir | None


def find_target(path: Path) -> Target:
    """Understand RUN_OR_RECIPE: a run directory, or a recipe whose run is looked for in its output_dir.

    Raises:
        RunDirError: The path is neither.
        RecipeError: The recipe has mistakes.
    """
    if path.is_dir():
        run = RunDir(path)
        trained = run.recipe()
        require_same_base(run, trained)
        return Target(trained, run)
    if not path.exists():
        raise RunDirError(f"{path} does not exist", help="give a run directory or a recipe")
    recipe = load_checked(path)[0].recipe
    run = RunDir(Path(recipe.output_dir).expanduser())
    if not run.exists():
        return Target(recipe, None)
    trained = run.recipe()
    run.artifact(trained)
    recipe = run.as_begun(recipe)
    asked = written_out(recipe, choose_dtype(recipe.model.dtype, choose_device()))
    asked = as_stored(asked, load_config(asked.model))
    if is_moved(asked.model, trained.model, run.read()):
        trained = trained.model_copy(update={"model": asked.model})
    for block in ("model", "method", "data"):
        if getattr(asked, block) != getattr(trained, block):
            raise RunDirError(
                f"the run in {run.root} was made with another `{block}` than {path} has now",
                help=f"evaluate the run itself, {run.root}, or train the recipe with --overwrite",
            )
    require_same_base(run, trained)
    # How to evaluate is the recipe's to say, also after training.
    return Target(trained.model_copy(update={"evaluation": recipe.evaluation}), run)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Target]:
    """Understand RUN_OR_RECIPE, and keep training out of the run for as long as it is read.

    Training that goes on replaces ``run.json`` and the artifact one after the other: read in between, they are of two
    states of the run. A run that is being trained is refused, whatever it holds of an earlier time.

    Raises:
        RunDirError: As ``find_target`` does, or the run is being written.
        RecipeError: The recipe has mistakes.
    """
    root = path if path.is_dir() else None
    if root is None and path.exists():
        root = Path(load_checked(path)[0].recipe.output_dir).expanduser()
    with contextlib.nullcontext() if root is None else RunDir(root).reading():
        yield find_target(path)


def load_plain(plan: Plan) -> nn.Module:
    """The base model, loaded as the method loads it, untrained, in evaluation mode."""
    recipe, context = plan.recipe, plan.context
    return load_base(recipe.model, recipe.method, context.dtype, context.device).eval()


def load_tuned(base: nn.Module, plan: Plan, run: RunDir) -> nn.Module:
    """Put what a run trained onto its base model, in evaluation mode."""
    recipe = plan.recipe
    return recipe.method.load(base, run.artifact(recipe), plan.context).to(plan.context.device).eval()
