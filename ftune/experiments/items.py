"""The part of a page that shows test rows, with what each model answered, and which of them it won or lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ftune.experiments.document import text
from ftune.experiments.study import BASE

__all__ = ["items_part"]

MOST_ITEMS = 300
"""Items that are shown; those on which the models differ come first."""
MOST_BYTES = 1_000_000
"""Bytes of all items together: a page stays small enough to be sent."""
LONGEST = 600
"""Characters of an item's text that are shown."""


def items_part(items: Sequence[Mapping[str, Any]], reference: str, called: str, others: Sequence[str]) -> Iterator[str]:
    """Test rows with every model's answer, those first on which the models differ most.

    Args:
        items: Each with ``row``, ``prompt``, ``reference`` (the right answer), and ``answers``: of each model, by its
            label, the answer and its score.
        reference: The label of the model that the others are compared with.
        called: How it is called in a sentence.
        others: Labels of the models that won or lost against it.
    """
    best = sorted(items, key=lambda item: (-_spread(item), item["row"]))[:MOST_ITEMS]
    drawn = [_item(item, reference) for item in best]
    sizes = itertools.accumulate(len(item.encode()) for item in drawn)
    shown = [item for item, size in zip(drawn, sizes, strict=True) if size <= MOST_BYTES]
    if len(items) > len(shown):
        yield f"<p class=note>{len(shown)} of {len(items)} rows: those on which the models differ most.</p>"
    options = "".join(f"<option>{text(name)} {kind}</option>" for name in others for kind in ("won", "lost"))
    against = (
        f'<label>Against {text(called)} <select data-won><option value="">all</option>{options}</select></label> '
        if others
        else ""
    )
    yield (
        f'<p class=find><label>Search <input type="search" data-items></label> {against}'
        '<span role="status" data-count></span></p>'
    )
    yield from shown


def _item(item: Mapping[str, Any], reference: str) -> str:
    answers = item["answers"]
    marks = [
        f"{name} {'won' if score > answers[reference][1] else 'lost'}"
        for name, (_, score) in answers.items()
        if name != BASE and reference in answers and score != answers[reference][1]
    ]
    given = "".join(
        f"<dt>{text(name)} <span class=score>{100 * score:.0f}</span></dt><dd>{text(_short(answer))}</dd>"
        for name, (answer, score) in answers.items()
    )
    return (
        f'<details class=item data-marks="{text(json.dumps(marks))}"><summary>row {item["row"]}: '
        f"{text(item['prompt'][-120:])}</summary><pre>{text(_short(item['prompt']))}</pre>"
        f"<dl><dt>right</dt><dd>{text(_short(item['reference']))}</dd>{given}</dl></details>"
    )


def _spread(item: Mapping[str, Any]) -> float:
    scores: list[float] = [score for _, score in item["answers"].values()]
    return max(scores) - min(scores)


def _short(whole: str) -> str:
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]} ..."
