"""Answers as classes: accuracy, macro-F1 and a table of what was taken for what, by scikit-learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ftune.artifacts.words import units
from ftune.errors import DataError

__all__ = ["MOST_CLASSES", "OTHER", "Classes", "measure_classes"]

MOST_CLASSES = 50
OTHER = "(none of them)"
"""The column of answers that name no class."""


@dataclass(frozen=True)
class Classes:
    """How answers fit a few classes.

    Attributes:
        accuracy: Share of answers of the right class.
        macro_f1: Mean over the classes of each one's F1.
        right: For each answer, whether it is.
        labels: The classes, as the references write them, the most frequent first.
        confusion: Counts; a row for each class of the references, a column for each class that was answered, and one
            more for answers that name none.
    """

    accuracy: float
    macro_f1: float
    right: tuple[bool, ...]
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]


def measure_classes(answers: Sequence[str], references: Sequence[str]) -> Classes:
    """Hold answers against the classes that the references name.

    An answer is of the class that it is, or of the one class that stands in it; else of none.

    Raises:
        DataError: There are more than ``MOST_CLASSES`` classes.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

    keys = [units(reference) or (reference.strip(),) for reference in references]
    ordered = [key for key, _ in Counter(keys).most_common()]
    if len(ordered) > MOST_CLASSES:
        raise DataError(
            f"the held-out answers are {len(ordered)} different ones, which are no classes (at most {MOST_CLASSES})",
            help="use exact_match, f1 or rouge_l in place of accuracy and macro_f1",
        )
    names = [references[keys.index(key)].strip() for key in ordered]
    truth = [ordered.index(key) for key in keys]
    found = [_class_of(units(answer) or (answer.strip(),), ordered) for answer in answers]
    every = list(range(len(ordered) + 1))
    confusion = confusion_matrix(truth, found, labels=every)[:-1]
    return Classes(
        float(accuracy_score(truth, found)),
        float(f1_score(truth, found, labels=every[:-1], average="macro", zero_division=0.0)),
        tuple(one == other for one, other in zip(truth, found, strict=True)),
        tuple(names),
        tuple(tuple(map(int, row)) for row in confusion),
    )


def _class_of(answer: tuple[str, ...], classes: Sequence[tuple[str, ...]]) -> int:
    """The index of the class that an answer names; ``len(classes)`` for none, or several."""
    if answer in classes:
        return classes.index(answer)
    places = [(i, _places(answer, key)) for i, key in enumerate(classes)]
    named = [(i, found) for i, found in places if found]
    # One class's name may be part of another's: "positive" stands in "very positive".
    longest = [
        i
        for i, found in named
        if not any(j != i and all(any(a >= c and b <= d for c, d in other) for a, b in found) for j, other in named)
    ]
    return longest[0] if len(longest) == 1 else len(classes)


def _places(answer: tuple[str, ...], key: tuple[str, ...]) -> list[tuple[int, int]]:
    return [(i, i + len(key)) for i in range(len(answer) - len(key) + 1) if answer[i : i + len(key)] == key]
