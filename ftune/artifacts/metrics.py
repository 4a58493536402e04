"""Task metrics: a generated answer against its reference, as a number between 0 and 1.

Other packages add metrics by name through the entry point group ``ftune.metrics``: a function of
``(prediction, reference)`` that returns a float.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from functools import partial
from importlib import metadata

from ftune.errors import FtuneError
from ftune.recipe.schema import MetricSpec

__all__ = ["Metric", "contains", "exact_match", "find_metric", "regex"]

Metric = Callable[[str, str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces (SQuAD's normalisation, arXiv:1606.05250)."""
    words = text.lower().translate(_PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same text after normalisation."""
    return float(normalize(prediction) == normalize(reference))


def contains(prediction: str, reference: str) -> float:
    """1 if the normalised reference stands in the normalised prediction as whole words."""
    return float(f" {normalize(reference)} " in f" {normalize(prediction)} ")


def regex(prediction: str, reference: str, *, pattern: str) -> float:
    """1 if the pattern's first group (or whole match) is found in both and equal; 0 where it finds nothing."""
    found = [re.search(pattern, text) for text in (prediction, reference)]
    if not all(found):
        return 0.0
    picked = [(m.group(1) if m.re.groups else m.group(0)) or "" for m in found if m]
    return float(normalize(picked[0]) == normalize(picked[1]))


_BUILTIN: dict[str, Callable[..., float]] = {"exact_match": exact_match, "contains": contains, "regex": regex}


def find_metric(spec: MetricSpec) -> Metric:
    """The function that a recipe's metric names.

    Raises:
        FtuneError: No builtin and no installed package has it.
    """
    if spec.name in _BUILTIN:
        function = _BUILTIN[spec.name]
        return partial(function, pattern=spec.pattern) if spec.pattern is not None else function
    for entry in metadata.entry_points(group="ftune.metrics", name=spec.name):
        loaded: Metric = entry.load()
        return loaded
    raise FtuneError(f"no metric `{spec.name}`", help="built in: " + ", ".join(_BUILTIN))
