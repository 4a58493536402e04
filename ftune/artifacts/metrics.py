"""Task metrics: a generated answer against its reference, as a number between 0 and 1.

Other packages add metrics by name through the entry point group ``ftune.metrics``: a function of
``(prediction, reference)`` that returns a float.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata

import regex as regex_engine

from ftune.artifacts.words import folded, units
from ftune.data.answers import NO_JSON, json_in, same_value
from ftune.errors import FtuneError
from ftune.recipe.schema import MetricSpec

__all__ = [
    "CLASS_METRICS",
    "COMPARES_CALLS",
    "Metric",
    "choice",
    "contains",
    "exact_match",
    "f1",
    "find_metric",
    "json_equal",
    "regex",
    "rouge_l",
    "strict",
    "unusable",
]

Metric = Callable[[str, str], float]

PATTERN_SECONDS = 2.0
"""How long a pattern may search one answer."""


def strict(prediction: str, reference: str) -> float:
    """1 if both are the same characters, white space at the ends aside."""
    return float(prediction.strip() == reference.strip())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are the same units (``ftune.artifacts.words``): case, punctuation and articles do not count."""
    one, other = units(prediction), units(reference)
    # Of punctuation alone nothing is left to compare.
    return float(one == other if one or other else folded(prediction) == folded(reference))


def contains(prediction: str, reference: str) -> float:
    """1 if the reference's units stand in the prediction, one behind the other; an empty one only in an empty one."""
    whole, part = units(prediction), units(reference)
    if not part:
        said, sought = folded(prediction), folded(reference)
        return float(said == sought or (bool(sought) and sought in said))
    return float(any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1)))


def f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over units, each as often as it stands (SQuAD's F1, arXiv:1606.05250)."""
    one, other = Counter(units(prediction)), Counter(units(reference))
    if not one or not other:
        return exact_match(prediction, reference)
    common = (one & other).total()
    return 2 * common / (one.total() + other.total())


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of units (ROUGE-L, Lin 2004; no stemming)."""
    one, other = units(prediction), units(reference)
    if not one or not other:
        return exact_match(prediction, reference)
    return 2 * _common_subsequence(one, other) / (len(one) + len(other))


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table in one integer (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for i, unit in enumerate(one):
        places[unit] = places.get(unit, 0) | 1 << i
    every = (1 << len(one)) - 1
    row = every
    for unit in other:
        match = row & places.get(unit, 0)
        row = (row + match | row - match) & every
    return len(one) - row.bit_count()


def json_equal(prediction: str, reference: str) -> float:
    """1 if both hold the same JSON value: 1 is 1.0, keys have no order, true is not 1.

    The value may stand in a code fence, or between other text.
    """
    one, other = json_in(prediction), json_in(reference)
    return float(one is not NO_JSON and other is not NO_JSON and same_value(one, other))


def choice(prediction: str, reference: str) -> float:
    """1 if both choose the same letter or letters, as in "B", "(b)", "B) Paris" or "The answer is (B)"."""
    one, other = _chosen(prediction), _chosen(reference)
    return float(bool(one) and one == other)


_LETTER = r"[\(\[\{*_\"'`“‘$]*\b([A-Za-z])\b[\)\]\}*_\"'`”’$]*"
_ONLY = regex_engine.compile(
    rf"(?:option|choice|answer)?[\s:]*{_LETTER}(?:\s*(?:,|&|/|and|und|et|y|,\s*and)\s*{_LETTER})*[\s.,:;!]*",
    regex_engine.IGNORECASE,
)
_SAID = regex_engine.compile(
    r"(?i:answers?|choices?|options?|letters?|both|choose|chose|select|pick|correct(?:\s+one)?|boxed\{|答案|选|選)"
    r"(?i:\s+(?:is|are|would be|must be|should be|options?|choices?|letters?|answers?|是|为))*\s*[:=是为為]?\s*"
    r"(?:\\boxed\{|\\text\{|[\(\[\{*_\"'`“‘$\s])*(?:([A-Z])(?![\p{Latin}\d_'’])|([a-z])(?=[\)\]\}\"'`*.,;]|\s*$|\s+(?:and|or|&)\s+[a-z](?!\w)))",
)
# How a second letter follows: "A and C", "A, C"; "or" decides on none. Behind a comma alone a sentence may begin.
_OPEN, _CLOSE = r"[\(\[\{*_\"'`“‘$]*", r"[)\]}*_\"'`”’$]*"
_LISTED = rf"(?={_CLOSE}\s*(?:[,.;:!?&/、和。]|$|(?i:and|or|und|oder|are)\b))"
_MORE = regex_engine.compile(
    rf"{_CLOSE}\s*,?\s*(?:"
    rf"(?P<or>(?i:or|oder|ou)\b|或)\s*{_OPEN}[A-Za-z](?![\p{{Latin}}\d_'’])"
    rf"|(?:(?i:and|und|et)\b|[&和])\s*{_OPEN}(?:(?P<letter>[A-HJ-Zb-hj-z])(?![\p{{Latin}}\d_'’+#])|(?P<letter>[A-Za-z]){_LISTED})"
    rf"|(?:(?<=,\s*)|[/、])\s*{_OPEN}(?P<letter>[A-Za-z]){_LISTED})"
)
_FIRST = regex_engine.compile(
    r"[\s(\[*_\"'`]*([A-Za-z])[*_\"'`]*(?:[)\].:,–—]|\s+-|(?=\s+(?:or|oder)\s+[A-Za-z](?!\w)))(?=[\s*_\"'`)]|$)"
)
_MARKED = regex_engine.compile(r"[(\[]([A-Z])[)\]]|\*\*([A-Z])\*\*")
_ALONE = regex_engine.compile(r"(?<![\w'’.+/-])([A-HJ-Z]|I(?=\s*[.,;)]|\s*$))(?![\w'’+#/]|-\w)")


def _chosen(text: str) -> frozenset[str]:
    """The letters that a text chooses; empty where it says none, or several without saying which."""
    text = folded(text)
    if _ONLY.fullmatch(text):
        named = regex_engine.findall(r"(?<!\w)[A-Za-z](?!\w)", text)
        return frozenset(letter.upper() for letter in named if letter != "y" or len(named) == 1)
    if said := [*_SAID.finditer(text)]:
        return _listed(text, said[-1])
    if first := _FIRST.match(text):
        return _listed(text, first)
    for pattern in (_MARKED, _ALONE):
        found = {letter.upper() for match in pattern.finditer(text) for letter in match.groups() if letter}
        if pattern is _ALONE and "A" in found and regex_engine.search(r"(?:^|[.!?]\s+)A\s+\w", text):
            found.discard("A")  # an article
        if len(found) == 1:
            return frozenset(found)
    return frozenset()


def _listed(text: str, first: regex_engine.Match[str]) -> frozenset[str]:
    """The letter that is said and those listed behind it; none where the text says "or"."""
    number = next(number for number, letter in enumerate(first.groups(), 1) if letter)
    letters, place = {first[number].upper()}, first.end(number)
    while more := _MORE.match(text, place):
        if more["or"]:
            return frozenset()
        letters.add(more["letter"].upper())
        place = more.end()
    return frozenset(letters)


def regex(prediction: str, reference: str, *, pattern: str) -> float:
    """1 if the pattern's first group (or whole match) is found in both and equal; 0 where it finds nothing.

    Raises:
        FtuneError: The pattern needs too long on one text.
    """
    one, other = _found(pattern, prediction), _found(pattern, reference)
    return float(one is not None and other is not None and exact_match(one, other) == 1.0)


def _found(pattern: str, text: str) -> str | None:
    try:
        match = regex_engine.search(pattern, text, timeout=PATTERN_SECONDS)
    except TimeoutError:
        raise FtuneError(
            f"the pattern {pattern!r} of the metric `regex` searched one answer for {PATTERN_SECONDS:g} seconds",
            help="repetitions inside of repetitions, as in (a+)+, take time without end: write it without them",
        ) from None
    if match is None:
        return None
    return (match.group(1) if match.re.groups else match.group(0)) or ""


_BUILTIN: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex,
    "strict": strict,
    "f1": f1,
    "rouge_l": rouge_l,
    "json": json_equal,
    "choice": choice,
}
CLASS_METRICS = ("accuracy", "macro_f1")
NO_MEAN = ("macro_f1",)
"""Metrics that are no mean over rows, so that two models cannot be compared row by row."""
"""Metrics over all answers at once (``ftune.artifacts.classes``)."""
COMPARES_CALLS = ("exact_match", "contains", "json")
"""Metrics that compare a tool call as a call, by its name and arguments, and not as text."""


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
    raise FtuneError(f"no metric `{spec.name}`", help="built in: " + ", ".join((*_BUILTIN, *CLASS_METRICS)))


def unusable(spec: MetricSpec, reference: str) -> bool:
    """Whether no answer could ever be right by this metric, since the reference has nothing that it compares."""
    if spec.name == "json":
        return json_in(reference) is NO_JSON
    if spec.name == "choice":
        return not _chosen(reference)
    return spec.name == "regex" and spec.pattern is not None and _found(spec.pattern, reference) is None
