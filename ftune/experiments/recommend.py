"""Which methods to try on a recipe, before any training: what fits, what is known, what was found here before."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ftune.experiments.fits import Fit, fits_table
from ftune.experiments.study import REFERENCE
from ftune.human import time_text
from ftune.methods import METHODS
from ftune.recipe import Recipe

__all__ = ["Earlier", "Recommendation", "recommend", "recommendation_text", "study_text"]


@dataclass(frozen=True)
class Earlier:
    """A study that was made before.

    Attributes:
        path: Its directory.
        model: What it was made on.
        verdict: In one sentence.
    """

    path: str
    model: str
    verdict: str


@dataclass(frozen=True)
class Recommendation:
    """What to try.

    Attributes:
        fits: Every method on the recipe.
        methods: Those to compare: they fit, and one run of them takes no longer than asked.
        too_long: Those that fit and take longer.
        earlier: Studies on this machine, those on the recipe's model first.
    """

    fits: tuple[Fit, ...]
    methods: tuple[str, ...]
    too_long: tuple[str, ...]
    earlier: tuple[Earlier, ...]


def recommend(recipe: Recipe, found: Sequence[Fit], seconds: float | None, studies: Path) -> Recommendation:
    """Choose what is worth comparing.

    Args:
        recipe: The recipe.
        found: Each method on it (``ftune.experiments.fits``).
        seconds: The longest that a run may take; None: as long as it likes.
        studies: The directory below which studies are looked for.
    """
    fitting = [fit for fit in found if fit.verdict in ("fits", "may just fit")]
    longest = float("inf") if seconds is None else seconds
    too_long = [fit.method for fit in fitting if (fit.seconds or 0) > longest]
    methods = [fit.method for fit in fitting if fit.method not in too_long]
    earlier = [study for path in sorted(studies.glob("*/compare.json")) if (study := _earlier(path)) is not None]
    earlier.sort(key=lambda study: study.model != recipe.model.id)
    return Recommendation(tuple(found), tuple(methods), tuple(too_long), tuple(earlier))


def recommendation_text(made: Recommendation, seconds: float | None, width: int) -> str:
    """The methods that fit, what is known of each and what was found here, wrapped to ``width``."""
    lines = [fits_table(made.fits, width), ""]
    if made.too_long and seconds is not None:
        lines += [f"a run takes longer than {time_text(seconds)}: {', '.join(made.too_long)}", ""]
    lines.append("what is known of those that fit:")
    lines += [_paragraph(name, METHODS[name].evidence, width) for name in made.methods]
    if made.earlier:
        lines += ["", "found on this machine before:"]
        lines += [_paragraph(study.path, f"{study.verdict} ({study.model})", width) for study in made.earlier]
    lines += ["", textwrap.fill(_ADVICE, width)]
    return "\n".join(lines)


_ADVICE = (
    "None of this says which is best on your data: methods that are not tuned alike differ by more than those that "
    "are. `ftune compare` finds out."
)


def study_text(recipe: str, made: Recommendation) -> str:
    """A study of the methods that fit, as YAML."""
    methods = [REFERENCE, *(name for name in made.methods if name != REFERENCE)]
    body: dict[str, Any] = {"recipe": recipe, "methods": methods, "trials": 5, "seeds": 3}
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, default_flow_style=None)


def _earlier(path: Path) -> Earlier | None:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return Earlier(str(path.parent), str(result["protocol"]["model"]), str(result["verdict"]["sentence"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _paragraph(name: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{name}: {text}", width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )
