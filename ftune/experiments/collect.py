"""A study's results as one value: what ``compare.json`` holds. The same runs give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftune.artifacts.run_dir import RunDir
from ftune.artifacts.task_scores import compared
from ftune.experiments.drift import environments
from ftune.experiments.rewind import curve
from ftune.experiments.serving import served
from ftune.experiments.settle import Settled
from ftune.experiments.study import BASE, REFERENCE, Candidate, LoadedStudy
from ftune.experiments.trials import Trials, read_json
from ftune.experiments.tuning import Outcome, Progress, Setting
from ftune.experiments.verdict import judge
from ftune.experiments.weights import again, size_of
from ftune.run.files import write_json

__all__ = ["collect"]


def collect(
    loaded: LoadedStudy,
    trials: Trials,
    settled: Settled,
    outcomes: Mapping[str, tuple[Outcome, Mapping[Setting, Progress]]],
    speeds: Mapping[str, Mapping[str, float]],
    times: Mapping[str, float],
) -> dict[str, Any]:
    """Judge the methods, and write ``compare.json``.

    Args:
        loaded: The study.
        trials: Its runs.
        settled: What they have in common.
        outcomes: What tuning found for each method, and how far each of its trials came.
        speeds: Of each method seconds of a step and bytes of its peak.
        times: Of the study (``ftune.experiments.times``).

    Returns:
        What was written. Shares are of 1, times in seconds, sizes in bytes.
    """
    study = loaded.study
    methods = []
    scores: dict[str, dict[str, dict[int, float]]] = {BASE: {BASE: trials.scores(BASE, BASE)}}
    for candidate in (c for c in loaded.candidates if c.label in outcomes):
        outcome, progress = outcomes[candidate.label]
        method, found = _method(loaded, trials, settled, candidate, outcome, progress)
        speed = speeds.get(candidate.label)
        method["costs"] = _costs(trials, settled, method, speed)
        method["tokens_per_second"] = settled.tokens_a_step / speed["seconds"] if speed else None
        method |= _first_run(trials, method)
        if study.rewind and outcome.best is not None:
            run, margin = outcome.best.name, study.margin / 100
            method["rewind"] = curve(trials, candidate.label, candidate.method, run, settled.steps, margin)
        methods.append(method)
        if method["runs"]:
            scores[candidate.label] = found
    # A prompt that leaves no room beside one method's virtual tokens is compared for none.
    rows = sorted(set.intersection(*(set(one) for runs in scores.values() for one in runs.values() if one)))
    matrices = {
        label: np.array([[one.get(row, np.nan) for row in rows] for one in runs.values()])
        for label, runs in scores.items()
    }
    verdict = None
    if REFERENCE in matrices:
        verdict = judge(
            matrices,
            base=BASE,
            reference=REFERENCE,
            margin=study.margin / 100,
            costs={m["label"]: _known(m["costs"]) for m in methods if m["label"] in matrices},
            prefer=study.prefer,
            not_tuned=[m["label"] for m in methods if m["at_edge"]],
        ).as_json()
    for method in methods:
        matrix = matrices.get(method["label"])
        means = [] if matrix is None else [float(row.mean()) for row in matrix if not np.isnan(row).any()]
        method["score"] = round(sum(means) / len(means), 6) if means else None
        for run, mean in zip(method["runs"], means, strict=True):
            run["score"] = round(mean, 6)
    result = {
        "version": 1,
        "verdict": verdict,
        "metric": settled.metric,
        "margin": study.margin / 100,
        "prefer": study.prefer,
        "steps": settled.steps,
        "seeds": settled.seeds(study.seeds),
        "rows": {**settled.counts, "compared": len(rows), "drawn": list(settled.drawn)},
        "base": {"score": round(float(matrices[BASE].mean()), 6), "loss": trials.result(BASE, BASE)["loss"]},
        "tasks_failed": trials.progress(BASE, "tasks").failed if study.tasks else None,
        "methods": methods,
        "left_out": settled.excluded,
        "protocol": {
            "recipe": study.recipe,
            "model": trials.base.recipe.model.id,
            "trials": study.trials,
            "search": {path: list(values) for path, values in study.search.items()},
            "common": settled.common,
            "data": trials.base.recipe.data.train.path,
            "tasks": list(study.tasks),
            "environments": [
                {"since": one.since[:10], "device": one.device, "versions": one.versions}
                for one in environments(loaded.root)
            ],
        },
        "time": {what: times[what] for what in ("study", "training", "answering")},
    }
    write_json(loaded.root / "compare.json", result)
    return result


def _method(
    loaded: LoadedStudy,
    trials: Trials,
    settled: Settled,
    candidate: Candidate,
    outcome: Outcome,
    progress: Mapping[Setting, Progress],
) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """A method's tuning and its runs, and the score of each test row by each run."""
    label, best = candidate.label, outcome.best
    runs: list[dict[str, Any]] = []
    scores: dict[str, dict[int, float]] = {}
    failures = [] if best is not None else ["every trial failed"]
    for seed in settled.seeds(loaded.study.seeds) if best is not None else ():
        assert best is not None
        name, recipe = trials.trial(candidate, best, seed)
        why = trials.progress(label, name).failed
        if why is not None:
            failures.append(f"seed {seed}: {why}")
            scores[name] = {}
            continue
        scores[name] = trials.scores(label, name)
        measured = trials.result(label, name)
        runs.append(
            {
                "seed": seed,
                "run": _below(trials.run(label, name), loaded.root),
                "recipe": _below(recipe, loaded.root),
                "loss": measured["loss"],
                "metrics": measured.get("metrics", {}),
                **_at_work(trials, label, name),
            }
        )
    tried = [
        {
            "rate": setting.rate,
            "fields": dict(setting.fields),
            "run": _below(trials.run(label, setting.name), loaded.root),
            "losses": {str(step): loss for step, loss in sorted(progress[setting].losses.items())},
            "quality": progress[setting].quality,
            "failed": progress[setting].failed,
        }
        for setting in outcome.tried
    ]
    lost = trials.forgotten(label, best.name) if best is not None else None
    tasks = loaded.study.tasks
    of_base = trials.task_scores(BASE, BASE, tasks) if tasks else None
    of_run = trials.task_scores(label, best.name, tasks) if tasks and best is not None else None
    if tasks and (why := trials.progress(label, "tasks").failed):
        failures.append(f"tasks: {why}")
    method = {
        "label": label,
        "method": candidate.method,
        "fields": dict(candidate.fields),
        "rate": best.rate if best else None,
        "searched": dict(best.fields) if best else {},
        "prior": settled.priors[label],
        "at_edge": outcome.at_edge,
        "failures": failures,
        "forgetting": lost,
        "tasks": compared({"base": of_base, "tuned": of_run}) if of_base and of_run else [],
        "trials": tried,
        "runs": runs,
        "again": _again(trials, label, best.name) if best is not None else None,
    }
    return method, scores


def _costs(
    trials: Trials, settled: Settled, method: Mapping[str, Any], speed: Mapping[str, float] | None
) -> dict[str, float | None]:
    """Memory and time of a run, measured by a few steps in turns, and the bytes of what it leaves."""
    size = None
    if method["runs"]:
        size = size_of(trials, method["label"], Path(method["runs"][0]["run"]).name)
    return {
        "memory": speed["bytes"] if speed else None,
        "time": speed["seconds"] * settled.steps if speed else None,
        "size": size,
    }


def _again(trials: Trials, label: str, name: str) -> dict[str, Any] | None:
    """A run that was trained again when its weights were gone, with the held-out losses of both; None: it was not."""
    run = again(trials, label, name)
    now = read_json(run / "run.json")
    if now.get("status") != "finished":
        return None
    then = read_json(trials.run(label, name) / "run.json")
    losses = [one["measured"].get("held_out_loss") for one in (then, now)]
    return {"run": _below(run, trials.root), "then": losses[0], "now": losses[1]}


def _known(costs: Mapping[str, float | None]) -> dict[str, float]:
    return {what: cost for what, cost in costs.items() if cost}


def _at_work(trials: Trials, label: str, name: str) -> dict[str, Any]:
    """What a run says of itself: whether its method was at work, and whether the model got better."""
    record = RunDir(trials.run(label, name)).read()
    effect = record.get("effect") or {"verdict": "unknown", "advice": []}
    return {"vitals": record.get("vitals_line", ""), "effect": effect["verdict"], "advice": effect["advice"]}


def _first_run(trials: Trials, method: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters that a method trains, and what its first run can be merged into, loaded and served by."""
    if not method["runs"]:
        return {"parameters": None, "exports": {}}
    run = RunDir(trials.root / method["runs"][0]["run"])
    recipe = run.recipe()
    settings = read_json(run.root / recipe.method.artifact / "adapter_config.json") or None
    checked = trials.exports(method["label"], run.root.name)
    return {
        "parameters": run.read()["plan"]["method"]["trainable"],
        "exports": {**checked, "served": served(type(recipe.method), settings)},
    }


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root))
