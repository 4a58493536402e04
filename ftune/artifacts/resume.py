"""Going on with a run: is it the same one, and from which checkpoint?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.same_base import base_of
from ftune.errors import RunDirError
from ftune.plan.engine import EngineChoice
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.recipe.schema import Recipe
from ftune.run.checkpoint import Checkpoints
from ftune.run.sinks.jsonl import read_events
from ftune.run.sinks.tracker import flatten

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["evaluation_missed", "record_changes", "require_same", "resolve_again", "restore"]

# What may differ between start and resume: it does not change what is trained.
_FREE_TO_CHANGE = (
    "checkpoint",
    "evaluation",
    "tracking",
    "output_dir",
    "training.stop_at_grad_norm",
    "training.cuda_graphs",
)
# Digests of the base, and what each is of.
_OF_MODEL = {
    "fingerprint": "the content of the model files",
    "tokenizer": "the tokenizer",
    "chat_template": "the chat template",
}


def resolve_again(recipe: Recipe, before: dict[str, Any], world_size: int, engine: EngineChoice) -> Plan:
    """Resolve a run whose data may have changed, with as many steps as it began with.

    The rate, and for some methods more, depend on the number of steps in all.
    """
    steps = before.get("plan", {}).get("training", {}).get("steps")
    fixed = recipe.training.model_copy(update={"max_steps": steps, "epochs": None})
    plan = resolve(recipe.model_copy(update={"training": fixed}), world_size=world_size, engine=engine)
    length = {name: getattr(recipe.training, name) for name in ("max_steps", "epochs")}
    training = plan.recipe.training.model_copy(update=length)
    return replace(plan, recipe=plan.recipe.model_copy(update={"training": training}))


def changes_of_data(before: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Fingerprints of the data that differ: ``{name: [then, now]}``."""
    then, now = before.get("plan", {}).get("data", {}), summary["data"]
    names = ("fingerprint", "eval_fingerprint")
    return {name: [then.get(name), now[name]] for name in names if then.get(name) != now[name]}


def changes_of_model(before: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """Digests of the base's files that differ: ``{name: [then, now]}``; a run of an older version has none."""
    pairs = {name: (base_of(before, name), summary["model"][name]) for name in _OF_MODEL}
    return {name: [then, now] for name, (then, now) in pairs.items() if then not in (None, now)}


def require_same(
    before: dict[str, Any],
    recipe: Recipe,
    summary: dict[str, Any],
    run: RunDir,
    *,
    accept_changed_data: bool,
    accept_changed_model: bool,
) -> None:
    """Hold that a resumed run is the one that was started.

    Raises:
        RunDirError: The recipe changed, or the data or the base model did and that was not accepted.
    """
    # Read as a recipe, so that a field which is newer than the run has its default.
    old, new = (flatten(recipe.model_dump(mode="json")) for recipe in (run.recipe(), recipe))
    if base_of(before) is not None and not changes_of_model(before, summary):
        new["model.id"] = old["model.id"]  # the same files, moved to another directory
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _FREE_TO_CHANGE and key.split(".")[0] not in _FREE_TO_CHANGE
    ]
    then, now = before.get("plan", {}).get("training", {}), summary["training"]
    changed += [
        f"{what}: {then.get(key)} then, {now[key]} now"
        for key, what in (("global_batch", "rows in an update"), ("steps", "steps in all"))
        if then.get(key) != now[key]
    ]
    ways = "restore the recipe, or train anew with --overwrite"
    of_model = changes_of_model(before, summary)
    # By another tokenizer or template the same rows are other tokens: that is said instead.
    same_text = not of_model.keys() & {"tokenizer", "chat_template"}
    if changes_of_data(before, summary) and same_text and not accept_changed_data:
        changed.append("the content of the data files")
        ways = "restore the data, go on with the new by --accept-changed-data, or train anew with --overwrite"
    if of_model and not accept_changed_model:
        changed += [_OF_MODEL[name] for name in of_model]
        ways = "restore that, go on with the new by --accept-changed-model, or train anew with --overwrite"
    if changed:
        raise RunDirError(f"{run.root} was started with another recipe:\n  " + "\n  ".join(changed), help=ways)


def record_changes(record: dict[str, Any], before: dict[str, Any], summary: dict[str, Any], start: int) -> list[str]:
    """Keep in ``run.json`` what changed under a resumed run, now and earlier; returns what to tell of now.

    Args:
        record: What the run writes; it gets ``data_changed`` and ``model_changed`` where there is something.
        before: What it wrote last.
        summary: The plan now.
        start: The step that it goes on from.
    """
    told = []
    for key, what, found in (
        ("data_changed", "data", changes_of_data(before, summary)),
        ("model_changed", "base model", changes_of_model(before, summary)),
    ):
        changes = list(before.get(key, []))
        if found:
            changes.append({"after_step": start} | found)
            told.append(f"the {what} changed since the run began: from step {start} on it trains on the new one")
        if changes:
            record[key] = changes
    return told


def restore(
    checkpoints: Checkpoints,
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    accelerator: Accelerator,
    resume: bool,
    metrics: Path,
) -> tuple[int, list[str], Path | None, dict[str, Any]]:
    """Load the newest whole checkpoint; returns the step, warnings, where it was, and what the loop kept in it.

    Raises:
        RunDirError: There are checkpoints, and every one is damaged; or there is none, and the run saved some; or a
            process does not see the one that the main process chose.
    """
    if not resume:
        return 0, [], None, {}
    path, notes = _newest(checkpoints, accelerator)
    if path is None and (damaged := checkpoints.set_aside()):
        names = ", ".join(aside.name for aside in damaged)
        raise RunDirError(
            "\n  ".join([f"every checkpoint in {checkpoints.directory} is damaged: {names}", *notes]),
            help="mend one and rename it back, or train anew from step 0 with --overwrite",
        )
    if path is None and (saved := _saved(metrics)):
        raise RunDirError(
            f"{checkpoints.directory} holds no checkpoint, but the run saved {saved}: going on would begin at step 0",
            help="put the checkpoints back, or train anew with --overwrite",
        )
    if path is None:
        return 0, ["no checkpoint to resume from: starting at step 0"], None, {}
    restored = checkpoints.load(path, model, plan.recipe.method, optimizer)
    if restored.step > plan.total_steps:
        raise RunDirError(
            f"{path} is after step {restored.step}, and this run has {plan.total_steps}",
            help="rename it, and --resume takes the one before",
        )
    return restored.step, notes, path, restored.progress


def _newest(checkpoints: Checkpoints, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, as the main process sees it, and its notes on damaged ones.

    Where each host has its own view of shared storage (a bucket's cache, say), processes that chose for themselves
    could go on from different steps.

    Raises:
        RunDirError: Here it is missing or damaged.
    """
    import torch

    # The main process alone sets damaged ones aside: it holds the lock.
    path, notes = checkpoints.newest() if accelerator.is_main_process else (None, [])
    if accelerator.num_processes == 1:
        return path, notes
    chosen = torch.tensor([-1 if path is None else int(path.name.removeprefix("step-"))], device=accelerator.device)
    step = int(accelerator.gather(chosen)[0])
    if step >= 0 and not accelerator.is_main_process:
        path = checkpoints.path(step)
        if wrong := checkpoints.wrong(step):
            raise RunDirError(
                f"process {accelerator.process_index} does not see {path} as the main process does: {wrong}",
                help="output_dir must be on storage that shows all machines the same files; wait until it does",
            )
    return path, notes


def _saved(metrics: Path) -> str | None:
    """The last checkpoint that a run reported; None where it reported none, or keeps no ``metrics.jsonl``."""
    names = [str(event.get("path")) for event in read_events(metrics) if event.get("event") == "saved"]
    return next((name for name in reversed(names) if name.startswith("step-")), None)


def evaluation_missed(plan: Plan, step: int, metrics: Path, until: int | None = None) -> bool:
    """Whether the evaluation that is due after ``step`` updates, one of them before the first, was not made yet.

    A run may have been stopped between a checkpoint and its evaluation.

    Args:
        plan: The run's.
        step: Updates made.
        metrics: The run's ``metrics.jsonl``.
        until: The update after which the run is to pause.
    """
    every = plan.recipe.evaluation.every_steps
    due = step in (0, plan.total_steps, until) or (every is not None and step % every == 0)
    done = any(event.get("event") == "eval" and event.get("step") == step for event in read_events(metrics))
    return bool(plan.eval_rows and due and not done)
