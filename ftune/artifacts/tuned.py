"""A model as a run left it, or as it was before: loaded once, for evaluation, chat and merge."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.same_base import is_moved, require_same_base
from ftune.artifacts.stored import put_on
from ftune.errors import FtuneError, RunDirError
from ftune.methods import Context
from ftune.methods.scaled import interpolated, scale_adapter
from ftune.plan.base_model import choose_device, load_base, load_config
from ftune.plan.plan import Plan
from ftune.plan.precision import choose_dtype
from ftune.plan.quantized import as_stored
from ftune.plan.resolve import written_out
from ftune.plan.slow import slower_here
from ftune.recipe import load_checked
from ftune.recipe.schema import Recipe

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Target",
    "at_checkpoint",
    "find_target",
    "load_plain",
    "load_target",
    "load_tuned",
    "put_target",
    "reading",
    "scaled",
]


@dataclass(frozen=True)
class Target:
    """What a command was pointed at: a recipe, and its run where there is one.

    Attributes:
        recipe: As the run resolved it, where there is one.
        run: A finished run, or one with a checkpoint.
        checkpoint: What to take in place of the run's result.
        notes: What to say of that.
        scale: How much to take of what the run changed: every weight is W0 + scale (W - W0).
    """

    recipe: Recipe
    run: RunDir | None
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    scale: float = 1.0


def scaled(target: Target, scale: float) -> Target:
    """A target that takes ``scale`` of what its run changed.

    Raises:
        FtuneError: The scale is none, or what was trained is no change of weights.
    """
    if scale == 1:
        return target
    if not 0 < scale < 1:
        raise FtuneError(f"--scale {scale:g}: not above 0 and at most 1", help="--scale 0.5 takes half of the change")
    method = target.recipe.method
    if target.run is None:
        raise FtuneError("--scale: there is no run yet, so nothing to scale")
    if not method.mergeable:
        raise FtuneError(f"a run of `{method.name}` has no scale", help=method.not_mergeable_because)
    if method.takes_from_base and target.checkpoint is not None:
        raise FtuneError(
            f"a checkpoint of `init: {getattr(method, 'init', '')}` has no scale: its base is not the untouched one",
            help="scale the run's end, or take the checkpoint as it is",
        )
    return replace(target, scale=scale, notes=(*target.notes, f"the trained change is applied at scale {scale:g}"))


def find_target(path: Path | Recipe, checkpoint: str | None = None, *, unfinished: bool = False) -> Target:
    """Understand RUN_OR_RECIPE: a run directory, or a recipe whose run is looked for in its output_dir.

    Args:
        path: RUN_OR_RECIPE, or a recipe that was read and checked.
        checkpoint: One of the run's checkpoints, ``step-40`` or ``40``.
        unfinished: Whether the newest checkpoint of a run that has not ended will do.

    Raises:
        RunDirError: The path is neither, or there is no such checkpoint.
        RecipeError: The recipe has mistakes.
    """
    if isinstance(path, Path) and path.is_dir():
        run = RunDir(path)
        trained = run.recipe()
        require_same_base(run, trained)
        return at_checkpoint(run, trained, checkpoint, unfinished=unfinished)
    if isinstance(path, Path) and not path.exists():
        raise RunDirError(f"{path} does not exist", help="give a run directory or a recipe")
    recipe = load_checked(path)[0].recipe if isinstance(path, Path) else path
    name = path if isinstance(path, Path) else "the recipe"
    run = RunDir(Path(recipe.output_dir).expanduser())
    if not run.exists():
        if checkpoint is not None:
            raise RunDirError(f"there is no run in {run.root}, so no checkpoint {checkpoint}")
        return Target(recipe, None)
    trained = run.recipe()
    found = at_checkpoint(run, trained, checkpoint, unfinished=unfinished)
    if found.checkpoint is None:
        run.artifact(trained)
    recipe = run.as_begun(recipe)
    asked = written_out(recipe, choose_dtype(recipe.model.dtype, choose_device()))
    asked = as_stored(asked, load_config(asked.model))
    if is_moved(asked.model, trained.model, run.read()):
        trained = trained.model_copy(update={"model": asked.model})
    for block in ("model", "method", "data"):
        if getattr(asked, block) != getattr(trained, block):
            raise RunDirError(
                f"the run in {run.root} was made with another `{block}` than {name} has now",
                help=f"evaluate the run itself, {run.root}, or train the recipe with --overwrite",
            )
    require_same_base(run, trained)
    # How to evaluate is the recipe's to say, also after training.
    return replace(found, recipe=trained.model_copy(update={"evaluation": recipe.evaluation}))


def at_checkpoint(run: RunDir, recipe: Recipe, name: str | None, *, unfinished: bool = False) -> Target:
    """A run at its end, at a checkpoint, or at its newest where it has not ended.

    Args:
        run: The run.
        recipe: As it resolved it.
        name: As ``find_target`` takes it.
        unfinished: Likewise.

    Raises:
        RunDirError: There is no such checkpoint, or it is damaged.
    """
    from ftune.run.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.checkpoints, keep=1)
    if name is None:
        done = (run.root / recipe.method.artifact).is_dir()
        steps = [] if done or not unfinished else [step for step in checkpoints.steps() if not checkpoints.wrong(step)]
        if not steps:
            return Target(recipe, run)
        note = f"the run has not ended: this is its newest checkpoint, step-{steps[-1]}"
        return Target(recipe, run, checkpoints.path(steps[-1]), (note,))
    steps = checkpoints.steps()
    wanted = name.removeprefix("checkpoints/").rstrip("/").removeprefix("step-")
    if not (wanted.isascii() and wanted.isdigit() and int(wanted) in steps):
        there = ", ".join(f"step-{step}" for step in steps) or "none"
        raise RunDirError(f"{run.root} has no checkpoint {name}", help=f"its checkpoints: {there}")
    if wrong := checkpoints.wrong(int(wanted)):
        raise RunDirError(f"checkpoint step-{wanted} of {run.root} is damaged: {wrong}", help="take another one")
    return Target(recipe, run, checkpoints.path(int(wanted)), (f"this is the checkpoint step-{wanted}",))


@contextlib.contextmanager
def reading(path: Path | Recipe, checkpoint: str | None = None, *, unfinished: bool = False) -> Iterator[Target]:
    """Understand RUN_OR_RECIPE, and keep training out of the run for as long as it is read.

    Training that goes on replaces ``run.json`` and the artifact one after the other: read in between, they are of two
    states of the run. A run that is being trained is refused, whatever it holds of an earlier time.

    Args:
        path: RUN_OR_RECIPE, or a recipe that was read and checked.
        checkpoint: As ``find_target`` takes it.
        unfinished: Likewise.

    Raises:
        RunDirError: As ``find_target`` does, or the run is being written.
        RecipeError: The recipe has mistakes.
    """
    root = path if isinstance(path, Path) and path.is_dir() else None
    if root is None and (not isinstance(path, Path) or path.exists()):
        recipe = load_checked(path)[0].recipe if isinstance(path, Path) else path
        root = Path(recipe.output_dir).expanduser()
    if root is not None and checkpoint is not None:
        # A checkpoint never changes once it is there: it can be read while the run goes on.
        RunDir(root).require_plain()
        held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    else:
        held = contextlib.nullcontext() if root is None else RunDir(root).reading()
    with held:
        found = find_target(path, checkpoint, unfinished=unfinished)
        slower = slower_here(found.recipe, choose_device(), of_run=found.run is not None)
        yield replace(found, notes=(*found.notes, *slower))


def load_plain(plan: Plan) -> nn.Module:
    """The base model, loaded as the method loads it, untrained, in evaluation mode."""
    recipe, context = plan.recipe, plan.context
    return load_base(recipe.model, recipe.method, context.dtype, context.device).eval()


def load_tuned(base: nn.Module, plan: Plan, run: RunDir) -> nn.Module:
    """Put what a run trained onto its base model, in evaluation mode."""
    return load_target(base, Target(plan.recipe, run), plan.context)


def put_target(base: nn.Module, target: Target, context: Context) -> nn.Module:
    """Put what a run trained, up to its end or to a checkpoint, onto its base model, all of it."""
    method, run = target.recipe.method, target.run
    assert run is not None
    if target.checkpoint is None:
        return put_on(method, base, run.artifact(target.recipe), context, run.base_names())
    from ftune.run.checkpoint import Checkpoints

    tuned = method.adapt(base, context)
    Checkpoints.load_model(target.checkpoint, tuned, method)
    return tuned


def load_target(base: nn.Module, target: Target, context: Context) -> nn.Module:
    """Put what a run trained, or a part of it, onto its base model, in evaluation mode.

    Scaled, a layer computes with the scaled weights, and holds them only where it was trained whole
    (``ftune.methods.scaled``).
    """
    whole = target.scale < 1 and target.recipe.method.artifact == "model"
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()} if whole else {}
    tuned = put_target(base, target, context)
    if whole:
        for name, parameter in tuned.named_parameters():
            parameter.data.copy_(interpolated(before[name], parameter, target.scale))
    elif target.scale < 1:
        scale_adapter(tuned, target.scale)
    return tuned.to(context.device).eval()
