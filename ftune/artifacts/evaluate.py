"""Evaluation: held-out loss and task metrics, the tuned model beside its base."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftune.artifacts.forgetting import Probe, forgotten, probe
from ftune.artifacts.measure import Measured, answerable, measure
from ftune.artifacts.objective import loss_of, make_objective
from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.scores import check_references
from ftune.artifacts.stops import stops_of_run, text_stop, until
from ftune.artifacts.tasks import Tasks
from ftune.artifacts.tuned import Target, load_plain, load_target
from ftune.data.splits import GenerationItem
from ftune.data.tokenize import generation_items
from ftune.errors import DataError
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.run.files import write_json, write_text

if TYPE_CHECKING:
    from torch import nn

    from ftune.artifacts.task_scores import TaskRun
    from ftune.run.objective import Objective

__all__ = ["evaluate"]

SAMPLES = 5  # generated answers kept for people to read


def evaluate(
    target: Target,
    *,
    base: bool,
    forgetting: bool | Literal["text"] = False,
    tasks: Tasks | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure a run on its held-out split; the base model too when asked, or alone when there is no run.

    The base is the tuned model with its adapter switched off. Where a method cannot be switched off (full
    fine-tuning), the base is measured before the trained weights are put onto it.

    Args:
        target: A run, or a recipe without one.
        base: Measure the base model beside the tuned one.
        forgetting: Measure too what of its base's knowledge a run has lost (``ftune.artifacts.forgetting``); ``text``:
            without the questions, which take longest.
        tasks: Tasks of lm-evaluation-harness, run on the base too.
        out: Where to keep the result; None: in the run, if there is one.

    Returns:
        ``{"tuned": {...}, "base": {...}, "samples": [...], ...}``; a run keeps it in ``eval.json``, every answer with
        its scores in ``predictions.jsonl``, and those of tasks in ``tasks.jsonl``. Where they cannot be written, the
        notes say why.

    Raises:
        DataError: The recipe holds nothing out, and nothing else is asked for.
    """
    import torch
    from accelerate import Accelerator

    from ftune.run.objective import Objective

    recipe, run = target.recipe, target.run
    held_out = recipe.data.eval is not None or bool(recipe.data.eval_fraction)
    if not (held_out or forgetting or tasks):
        raise DataError(
            "the recipe holds no data out, so there is nothing to evaluate on",
            help="add `data.eval: FILE` or `data.eval_fraction: 0.1`",
        )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    plan = resolve(recipe)
    notes = [*target.notes, *(_changed_data(plan, run) if run and held_out else [])]
    items, too_long = _generation_items(plan) if held_out else ([], 0)
    if held_out:
        notes += check_references(recipe.evaluation.metrics, [item.reference for item in items])
    result: dict[str, Any] = {
        "run": str(run.root) if run else None,
        "method": recipe.method.name,
        "model": recipe.model.id,
        "checkpoint": target.checkpoint.name if target.checkpoint else None,
        "scale": target.scale,
        "examples": len(plan.splits.eval.examples) if plan.splits.eval else 0,
        "rows": len(plan.splits.eval.rows) if plan.splits.eval else 0,
        "generated": len(items),
        "prompts_too_long": too_long,
        "notes": notes,
    }
    found: dict[str, Measured] = {}
    stops = stops_of_run(run, plan)
    loss = loss_of(run.read() if run else {})

    def objective_of(model: nn.Module) -> Objective:
        # In float32 neither layers that keep less nor packed rows change the loss, and to try them out takes longer
        # than to go without.
        exact = plan.context.dtype == torch.float32
        return Objective(model, torch.float32) if exact else make_objective(model, plan, accelerator, loss)[0]

    def measured(who: str, objective: Objective) -> None:
        if not held_out:
            return
        found[who] = measure(objective, plan, items, stops, accelerator)
        result[who] = found[who].numbers

    def remember(who: str, model: nn.Module) -> None:
        if forgetting:
            probes[who] = probe(model, plan.tokenizer, plan.context.dtype, questions=forgetting != "text")
        if tasks:
            from ftune.artifacts.task_scores import run_tasks

            task_runs[who] = run_tasks(tasks, model, plan, stops)

    probes: dict[str, Probe] = {}
    task_runs: dict[str, TaskRun] = {}
    model = load_plain(plan)
    began = time.perf_counter()
    if run is None:
        measured("base", objective_of(model))
        remember("base", model)
    else:
        switchable = recipe.method.artifact == "adapter"
        if not switchable:
            remember("base", model)
        if base and not switchable:
            measured("base", objective_of(model))
        objective = objective_of(load_target(model, replace(target, recipe=plan.recipe), plan.context))
        measured("tuned", objective)
        remember("tuned", objective.model)
        if (base or forgetting or tasks) and switchable:
            switched_off = recipe.method.switched_off(objective.model)
            assert switched_off is not None
            with switched_off:
                remember("base", objective.model)
                if base:
                    measured("base", objective)
    result["samples"] = [
        {"row": item.row, "reference": item.reference.text, **{who: m.answers[i].text for who, m in found.items()}}
        for i, item in enumerate(items[:SAMPLES])
    ]
    result["seconds"] = time.perf_counter() - began
    if len(probes) == 2:
        result["forgetting"] = forgotten(probes["base"], probes["tuned"])
    if tasks:
        from ftune.artifacts.task_scores import tasks_result

        task_runs = dict(sorted(task_runs.items()))  # base, tuned
        result["tasks"] = tasks_result(tasks, task_runs)
    if out is None and run is not None:
        out = run.evaluation(target.checkpoint, target.scale)
    if out is not None:
        result["predictions"] = _keep(out, result, plan, items, found, task_runs)
    return result


def _keep(
    out: Path,
    result: dict[str, Any],
    plan: Plan,
    items: Sequence[GenerationItem],
    found: dict[str, Measured],
    task_runs: dict[str, TaskRun],
) -> str | None:
    """Write ``eval.json``, ``predictions.jsonl`` and ``tasks.jsonl``; returns where the answers are.

    What cannot be written is noted: the result is there, and is not lost for that.
    """
    lines = []
    for i, item in enumerate(items):
        line: dict[str, Any] = {"row": item.row}
        line |= {"prompt": plan.tokenizer.decode(item.prompt_ids.tolist()), "reference": item.reference.whole}
        for who, measured in found.items():
            line[who] = {"answer": measured.answers[i].whole}
            if measured.scores is not None:
                line[who]["scores"] = measured.scores.rows[i]
        lines.append(json.dumps(line, ensure_ascii=False))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "eval.json", result)
        write_text(out / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
        if task_runs:
            from ftune.artifacts.task_scores import item_lines

            write_text(out / "tasks.jsonl", "".join(f"{line}\n" for line in item_lines(task_runs)))
    except OSError as error:
        result["notes"].append(f"the result could not be kept in {out}: {error}")
        return None
    if task_runs:
        result["task_items"] = str(out / "tasks.jsonl")
    return str(out / "predictions.jsonl") if items else None


def _changed_data(plan: Plan, run: RunDir) -> list[str]:
    """What to say when the held-out rows are not those of the run.

    Raises:
        DataError: They are drawn from the training rows, so some of them were trained on.
    """
    assert plan.splits.eval is not None
    if run.read()["plan"]["data"]["eval_fingerprint"] == plan.splits.eval.fingerprint:
        return []
    if plan.recipe.data.eval is None:
        raise DataError(
            "the data changed since the run was trained: rows held out now were trained on then",
            help="restore the file, or name held-out rows of their own with data.eval",
        )
    return ["the held-out data differs from that of the run"]


def _generation_items(plan: Plan) -> tuple[list[GenerationItem], int]:
    """What to answer, and how many prompts are left out because model and answer would not fit the context."""
    if not plan.recipe.evaluation.metrics:
        return [], 0
    held_out, spec = plan.splits.eval, plan.recipe.evaluation
    assert held_out is not None
    items = generation_items(held_out.rows, plan.tokenizer, plan.recipe.data, held_out.format, spec.max_examples)
    text = text_stop(plan.recipe, plan.tokenizer)
    items = [replace(item, reference=until(item.reference, text)) for item in items]
    fitting, context = answerable(items, plan.recipe)
    if not fitting:
        raise DataError(
            f"no held-out prompt leaves room for an answer of {spec.max_new_tokens} tokens in the model's context of "
            f"{context} tokens",
            help="lower `evaluation.max_new_tokens`, or hold out rows with shorter prompts",
        )
    return fitting, len(items) - len(fitting)
