"""Every metric of a recipe on every answer: a score for each row, and the numbers of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftune.artifacts.classes import Classes, measure_classes
from ftune.artifacts.metrics import CLASS_METRICS, COMPARES_CALLS, find_metric, unusable
from ftune.data.answers import Answer, same_value
from ftune.errors import DataError
from ftune.recipe.schema import MetricSpec

__all__ = ["Scores", "check_references", "key_of", "score"]


@dataclass(frozen=True)
class Scores:
    """What the metrics say of some answers.

    Attributes:
        metrics: A number for each metric.
        rows: For each answer, its score by each metric; of ``accuracy`` and ``macro_f1`` whether its class is right.
        classes: Where a metric of classes was asked for.
    """

    metrics: dict[str, float]
    rows: list[dict[str, float]]
    classes: Classes | None


def key_of(spec: MetricSpec, specs: Sequence[MetricSpec]) -> str:
    """The name of a metric in results; with its pattern or setting where another has the same name."""
    if sum(other.name == spec.name for other in specs) == 1:
        return spec.name
    marks = [*([spec.pattern] if spec.pattern is not None else []), *(["with reasoning"] if spec.reasoning else [])]
    return " ".join([spec.name, *marks])


def score(specs: Sequence[MetricSpec], answers: Sequence[Answer], references: Sequence[Answer]) -> Scores:
    """Score answers against references, in the same order; at least one.

    Raises:
        FtuneError: A pattern takes too long.
        DataError: Metrics of classes, and too many classes.
    """
    metrics: dict[str, float] = {}
    rows: list[dict[str, float]] = [{} for _ in answers]
    classes: Classes | None = None
    for spec in specs:
        key = key_of(spec, specs)
        texts = [
            (_text(answer, spec), _text(reference, spec)) for answer, reference in zip(answers, references, strict=True)
        ]
        if spec.name in CLASS_METRICS:
            classes = measure_classes(*map(list, zip(*texts, strict=True)))
            values = [float(right) for right in classes.right]
            metrics[key] = getattr(classes, spec.name)
        else:
            compare = find_metric(spec)
            values = [
                _same_calls(answer, reference)
                if reference.calls and spec.name in COMPARES_CALLS
                else float(compare(*pair))
                for answer, reference, pair in zip(answers, references, texts, strict=True)
            ]
            metrics[key] = sum(values) / len(values)
        for row, value in zip(rows, values, strict=True):
            row[key] = value
    return Scores(metrics, rows, classes)


def check_references(specs: Sequence[MetricSpec], references: Sequence[Answer]) -> list[str]:
    """What to say of references that a metric cannot compare with anything.

    Raises:
        DataError: It can compare none of them.
    """
    notes: list[str] = []
    blank = sum(not (reference.text or reference.calls) and bool(reference.whole) for reference in references)
    if blank and not all(spec.reasoning for spec in specs):
        notes.append(
            f"{blank} of {len(references)} references are empty: they are reasoning alone, no part of an answer "
            "(a metric with `reasoning: true` compares it)"
        )
    for spec in specs:
        bad = sum(
            not (reference.calls and spec.name in COMPARES_CALLS) and unusable(spec, _text(reference, spec))
            for reference in references
        )
        what = {"json": "JSON", "choice": "a letter to choose", "regex": "what the pattern looks for"}.get(spec.name)
        if bad and bad == len(references):
            raise DataError(
                f"metric `{spec.name}`: no held-out answer has {what}, so that every score would be 0",
                help="correct the pattern" if spec.name == "regex" else "use another metric for these answers",
            )
        if bad:
            notes.append(f"`{key_of(spec, specs)}`: {bad} of {len(references)} references have not {what}: scored 0")
    return notes


def _text(answer: Answer, spec: MetricSpec) -> str:
    return answer.whole if spec.reasoning else answer.text


def _same_calls(answer: Answer, reference: Answer) -> float:
    """1 if the same tools are called with the same arguments, in the same order."""
    one: list[Any] = [list(call) for call in answer.calls]
    other: list[Any] = [list(call) for call in reference.calls]
    return float(same_value(one, other))
