"""Rewinding: quality against forgetting of each method's chosen run, earlier in it and at parts of its change.

The end of a run often overshoots: an earlier checkpoint, or W0 + s (W - W0) for s below 1, may forget less at the same
quality (arXiv:2605.28819). Measured are the checkpoints that tuning left behind, and some scales of the end. Quality is
that on the validation rows, for a point is chosen by it; forgetting is how much the loss on neutral text rose
(``ftune.artifacts.forgetting``). Results are kept in ``STUDY/rewind/LABEL/``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftune.experiments.document import Table
from ftune.experiments.pool import Job
from ftune.experiments.trials import Trials, read_json
from ftune.experiments.weights import run_with_weights
from ftune.methods import METHODS
from ftune.run.checkpoint import FILES

__all__ = ["MOST_POINTS", "best_point", "curve", "paused_steps", "rewind_jobs", "rewind_lines", "rewind_table"]

SCALES = (0.5, 0.75)
"""Scales of the end that are measured, besides all of it."""
PARTS = (4, 2)
"""Checkpoints that are measured, besides the end: where tuning paused, after these parts of the steps."""
MOST_POINTS = len(SCALES) + len(PARTS)
"""Points that are measured of a run, besides its end as it is, which is measured anyway."""


@dataclass(frozen=True)
class _Point:
    step: int
    scale: float

    @property
    def name(self) -> str:
        return f"step-{self.step}" + (f"-scale-{self.scale:g}" if self.scale < 1 else "")


def paused_steps(steps: int) -> list[int]:
    """Where tuning paused in a run of so many steps: its checkpoints there are measured."""
    return [step for part in PARTS if (step := math.ceil(steps / part)) < steps]


def rewind_jobs(trials: Trials, label: str, method: str, name: str, steps: int) -> Iterator[Job]:
    """What is still to be measured of a run that was trained to its end; its weights may be gone.

    Args:
        trials: The study's runs.
        label: Of the method, in the study.
        method: Its name.
        name: Of the run.
        steps: It has made.
    """
    for point, found in _walk(trials, label, method, name, steps):
        job = f"{name}-{point.name}"
        if found is None and trials.progress(label, job).failed is None:
            message = {
                "kind": "rewind",
                "run": str(run_with_weights(trials, label, name)),
                "checkpoint": None if point.step == steps else str(point.step),
                "scale": point.scale,
                "out": str(_out(trials, label, name, point)),
            }
            yield Job(label, job, message)


def curve(trials: Trials, label: str, method: str, name: str, steps: int, margin: float) -> dict[str, Any]:
    """What was measured of a run, as ``compare.json`` has it.

    Args:
        trials: The study's runs.
        label: Of the method, in the study.
        method: Its name.
        name: Of the run.
        steps: It has made.
        margin: The least difference of quality that matters, a share of 1.

    Returns:
        ``points``, each with ``step``, ``scale``, ``quality`` (a share of 1), ``loss`` (held-out) and ``forgetting``
        (nats a token); ``best``, one of them, or None where there are none; ``command``, which makes that;
        ``merges``, whether the method has scales.
    """
    run = run_with_weights(trials, label, name) or trials.run(label, name)
    walked = _walk(trials, label, method, name, steps)
    points = [{"step": point.step, "scale": point.scale, **found} for point, found in walked if found is not None]
    best, merges = best_point(points, margin), METHODS[method].mergeable
    command = None
    if best is not None:
        parts = ["ftune", "merge" if merges else "chat", str(run)]
        parts += [] if best["scale"] == 1 else ["--scale", f"{best['scale']:g}"]
        parts += [] if best["step"] == steps else ["--step", str(best["step"])]
        command = shlex.join(parts)
    return {"points": points, "best": best, "command": command, "merges": merges}


def best_point(points: Sequence[Mapping[str, Any]], margin: float) -> Mapping[str, Any] | None:
    """The point that forgets least among those whose quality is within the margin of the best one's."""
    enough = max((point["quality"] for point in points), default=0.0) - margin
    near = [point for point in points if point["quality"] >= enough - 1e-9]
    return min(near, key=lambda point: (point["forgetting"], -point["quality"]), default=None)


def rewind_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A line for each method: its best point, and how it is made."""
    for method in result["methods"]:
        if not method.get("rewind") or method["rewind"]["best"] is None:
            continue
        found, metric = method["rewind"], result["metric"]
        best, end = found["best"], next((p for p in found["points"] if _is_end(p, result["steps"])), None)
        text = f"`{method['label']}`: {_where(best, result['steps'])}, {_numbers(best, metric)}"
        if end is not None and best != end:
            text += f" (its end: {_numbers(end, metric)})"
        text += f": `{found['command']}`"
        yield text if found["merges"] else f"{text}; it cannot be merged, so only its checkpoints are compared"


def rewind_table(result: Mapping[str, Any]) -> Table:
    """Every point; ``*`` is the best one of its method."""
    rows = []
    for method in result["methods"]:
        found = method.get("rewind") or {"points": [], "best": None}
        for point in found["points"]:
            rows.append(
                [
                    method["label"],
                    str(point["step"]),
                    f"{point['scale']:g} {'*' if point == found['best'] else ''}".strip(),
                    f"{100 * point['quality']:.1f}",
                    f"{point['loss']:.4f}",
                    f"{point['forgetting']:+.3f}",
                ]
            )
    return ("method", "step", "scale", f"{result['metric']} %", "loss", "forgets"), rows


def _walk(
    trials: Trials, label: str, method: str, name: str, steps: int
) -> Iterator[tuple[_Point, dict[str, Any] | None]]:
    """Every point of a run that was measured, with what was found, or that can be.

    Where tuning paused, as far as checkpoints are there; then parts of the end, and the end.
    """
    run = run_with_weights(trials, label, name) or trials.run(label, name)
    scales = (*SCALES, 1.0) if METHODS[method].mergeable else (1.0,)
    for point in (*(_Point(step, 1.0) for step in paused_steps(steps)), *(_Point(steps, scale) for scale in scales)):
        found = _measured(trials, label, name, point, steps)
        if found is not None or point.step == steps or (run / f"checkpoints/step-{point.step}/{FILES[0]}").is_file():
            yield point, found


def _measured(trials: Trials, label: str, name: str, point: _Point, steps: int) -> dict[str, Any] | None:
    """Quality, loss and forgetting at a point; of the end they may have been measured for the report already."""
    kept = read_json(_out(trials, label, name, point) / "eval.json")
    lost = kept.get("forgetting")
    if not kept and point == _Point(steps, 1.0):
        kept, lost = read_json(trials.run(label, name) / "eval.json"), trials.forgotten(label, name)
    quality = kept.get("tuned", {}).get("metrics", {}).get(trials.metric)
    if quality is None or lost is None:
        return None
    return {"quality": quality, "loss": kept["tuned"]["loss"], "forgetting": lost["loss"][0]}


def _out(trials: Trials, label: str, name: str, point: _Point) -> Path:
    return trials.root / "rewind" / label / f"{name}-{point.name}"


def _is_end(point: Mapping[str, Any], steps: int) -> bool:
    return bool(point["step"] == steps and point["scale"] == 1)


def _where(point: Mapping[str, Any], steps: int) -> str:
    if _is_end(point, steps):
        return "its end is the best point"
    if point["step"] == steps:
        return f"best at scale {point['scale']:g} of its end"
    return f"best after {point['step']} of {steps} steps"


def _numbers(point: Mapping[str, Any], metric: str) -> str:
    return f"{metric} {100 * point['quality']:.1f} %, forgets {point['forgetting']:+.3f}"
