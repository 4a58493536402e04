"""The runs of a study on the disk: their recipes, and how far each has come.

::

    STUDY/study.json          what the study began with
    STUDY/environments.json   what it was computed with: versions, processor, days
    STUDY/times.jsonl         how long each job took
    STUDY/data/               rows that were drawn, and how
    STUDY/recipes/LABEL/      a recipe for each run; NAME.failed says why one cannot go on
    STUDY/runs/LABEL/NAME/    run directories; NAME is `rate-2e-04`, or `seed-8` of the chosen setting
    STUDY/tests/LABEL/NAME/   eval.json and predictions.jsonl on the test rows; those of the base in tests/base/;
                              tasks.json and tasks.jsonl of tasks; exports.json of each method's first run
    STUDY/rewind/LABEL/       the same on the validation rows, of checkpoints and of scaled changes
    STUDY/speed/LABEL-N/      a few steps in a process of their own, for time and memory
    STUDY/compare.json, compare.md, compare.html

Every run is an ordinary one: ``ftune train STUDY/recipes/LABEL/NAME.yaml`` repeats it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftune.artifacts.task_scores import Score
from ftune.errors import FtuneError
from ftune.experiments.answers import read_answers
from ftune.experiments.study import BASE, Candidate
from ftune.experiments.tuning import Progress, Setting
from ftune.recipe.load import Loaded
from ftune.recipe.other_method import of_another_method
from ftune.run.files import write_text
from ftune.run.sinks.jsonl import read_events

__all__ = ["Trials", "headline", "item_texts", "plain", "read_json", "reason", "recipe_text"]


@dataclass(frozen=True)
class Trials:
    """The recipes and runs of a study.

    Attributes:
        root: The study's directory.
        base: The recipe that all are made from.
        common: What all runs have in common, by field: ``training.max_steps``.
        own: What a method has in place of it, by its label.
        metric: What is compared.
        seed: Of training while tuning.
        keep: Checkpoints of a trial that stay.
    """

    root: Path
    base: Loaded
    common: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]
    metric: str
    seed: int
    keep: int = 1

    def raw(self, candidate: Candidate, changes: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe of a method as plain data."""
        raw: dict[str, Any] = plain(self.base.raw)
        raw["method"] = plain(of_another_method(raw, candidate.method)[0]) | plain(dict(candidate.fields))
        for path, value in [*self.common.items(), *self.own.get(candidate.label, {}).items(), *changes.items()]:
            *blocks, name = path.split(".")
            where = raw
            for block in blocks:
                if not isinstance(where.get(block), dict):
                    where[block] = {}
                where = where[block]
            if value is None:
                where.pop(name, None)
            else:
                where[name] = plain(value)
        return raw

    def write(self, candidate: Candidate, name: str, changes: Mapping[str, Any], out: Path | None = None) -> Path:
        """Write the recipe of a run, unless it is there; returns where.

        Args:
            candidate: The method.
            name: The run's.
            changes: What it has of its own, by field.
            out: What is made of it; where the recipe is another than before, that is deleted. None: the run, which
                is never deleted.
        """
        path = self.recipe(candidate.label, name)
        known = path.is_file()
        if known and out is None:
            return path
        text = recipe_text(self.raw(candidate, {"output_dir": str(out or self.run(candidate.label, name)), **changes}))
        if not known or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            if out is not None and out.is_dir():
                shutil.rmtree(out)
            write_text(path, text)
        return path

    def trial(self, candidate: Candidate, setting: Setting, seed: int | None = None) -> tuple[str, Path]:
        """Name and recipe of a trial, or of a chosen setting's run with another seed."""
        name = setting.name if seed in (None, self.seed) else f"seed-{seed}"
        changes = {"optimizer.learning_rate": setting.rate, **dict(setting.fields)}
        if self.keep > 1 and name == setting.name:
            changes["checkpoint.keep"] = self.keep
        return name, self.write(candidate, name, {**changes, "training.seed": self.seed if seed is None else seed})

    def recipe(self, label: str, name: str) -> Path:
        """Where the recipe of a run is."""
        return self.root / "recipes" / label / f"{name}.yaml"

    def run(self, label: str, name: str) -> Path:
        """Where a run is."""
        return self.root / "runs" / label / name

    def test(self, label: str, name: str) -> Path:
        """Where a run's result on the test rows is."""
        return self.root / "tests" / label / name if label != BASE else self.root / "tests" / BASE

    def fail(self, label: str, name: str, why: str) -> None:
        """Keep why a run cannot go on."""
        write_text(self.failure(label, name), f"{why}\n")

    def progress(self, label: str, name: str) -> Progress:
        """How far a run has come, and its quality on the validation rows."""
        run, failure = self.run(label, name), self.failure(label, name)
        losses = {
            event["step"]: float("nan") if event["loss"] is None else event["loss"]
            for event in read_events(run / "metrics.jsonl")
            if event.get("event") == "eval" and event.get("step")
        }
        measured = read_json(run / "eval.json").get("tuned", {}).get("metrics", {}).get(self.metric)
        why = failure.read_text().strip() if failure.is_file() else None
        return Progress(losses, why, measured)

    def tested(self, label: str, name: str) -> bool:
        """Whether a run was measured on the test rows."""
        return (self.test(label, name) / "predictions.jsonl").is_file()

    def scores(self, label: str, name: str) -> dict[int, float]:
        """The score of each test row, by its number."""
        return self.scores_in(self.test(label, name), "base" if label == BASE else "tuned")

    def scores_in(self, out: Path, who: str) -> dict[int, float]:
        """The score of each row that was answered, by its number; who: ``base`` or ``tuned``."""
        return {row: float(one.scores[self.metric]) for row, one in read_answers(out, who).items()}

    def result(self, label: str, name: str) -> dict[str, Any]:
        """What was measured on the test rows: ``loss``, ``metrics``, ``seconds``; empty where it was not."""
        who = "base" if label == BASE else "tuned"
        found: dict[str, Any] = read_json(self.test(label, name) / "eval.json").get(who, {})
        return found

    def forgotten(self, label: str, name: str) -> dict[str, Any] | None:
        """What a run lost of its base's knowledge (``ftune.artifacts.forgetting``), where that was measured."""
        found: dict[str, Any] | None = read_json(self.test(label, name) / "eval.json").get("forgetting")
        return found

    def exports(self, label: str, name: str) -> dict[str, Any]:
        """Whether a run can be merged and loaded (``ftune.artifacts.exports``); empty where that was not checked."""
        return read_json(self.test(label, name) / "exports.json")

    def task_scores(self, label: str, name: str, tasks: Sequence[str]) -> list[Score] | None:
        """What a run, or the base, scored on tasks; None where it was not measured on these, of the base's items."""
        found, of_base = (read_json(self.test(*of) / "tasks.json") for of in ((label, name), (BASE, BASE)))
        if found.get("tasks") != list(tasks) or found.get("items") != of_base.get("items"):
            return None
        return [Score(**score) for score in found["scores"]]

    def speed(self, label: str, number: int, count: int) -> dict[str, float] | None:
        """Seconds of a step and bytes of the peak, of a run of ``count`` steps that was made for them.

        The first step is left out of the time.
        """
        steps = [
            event
            for event in read_events(self.root / "speed" / f"{label}-{number}" / "metrics.jsonl")
            if event.get("event") == "step"
        ]
        if len(steps) < min(count, 2):
            return None
        seconds = [event["seconds"] for event in steps[1:count] or steps]
        return {"seconds": sum(seconds) / len(seconds), "bytes": max(event["peak_bytes"] for event in steps)}

    def failure(self, label: str, name: str) -> Path:
        """Where it is kept why a run cannot go on."""
        return self.root / "recipes" / label / f"{name}.failed"


def item_texts(result: Mapping[str, Any], root: Path) -> list[dict[str, Any]]:
    """Every test row with its prompt, its right answer, and the answer and score of the base and of each method.

    Args:
        result: What ``compare.json`` holds; of each method its first run counts.
        root: The study's directory.
    """
    runs = {BASE: Path("tests") / BASE}
    runs |= {
        method["label"]: Path("tests", *Path(method["runs"][0]["run"]).parts[1:])
        for method in result["methods"]
        if method["runs"]
    }
    found: dict[int, dict[str, Any]] = {}
    for label, path in runs.items():
        for row, one in read_answers(root / path, "base" if label == BASE else "tuned").items():
            item = found.setdefault(row, {"row": row, "prompt": one.prompt, "reference": one.reference, "answers": {}})
            item["answers"][label] = (one.answer, one.scores[result["metric"]])
    return [found[row] for row in sorted(found)]


def recipe_text(raw: Mapping[str, Any]) -> str:
    """A recipe in plain data as YAML."""
    text: str = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    return text


def headline(error: FtuneError) -> str:
    """What an error says first, for a line among others."""
    return error.message.strip().splitlines()[0].removeprefix("error: ")


def reason(error: FtuneError) -> str:
    """What an error says first, and how to mend it."""
    inside = [line.strip() for line in error.message.splitlines() if line.strip().startswith("help:")]
    help = f"help: {error.help}" if error.help else (*inside, "")[0]
    return f"{headline(error)} ({help})" if help else headline(error)


def plain(value: Any) -> Any:
    """Data that YAML can write: no tuples, no strings of a class of their own."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, str) else copy.copy(value)


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, or it is no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}
