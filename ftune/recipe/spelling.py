"""Which word was meant: the nearest of some names, or none rather than a wrong one."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["closest"]

LONGEST = 100
MOST_EDITS = 3


def closest(word: object, candidates: Iterable[str], edits: int = MOST_EDITS) -> str | None:
    """The candidate that a slip of the fingers makes of a word; case, dashes and underscores do not count.

    A slip is a letter too many, too few, another, or two exchanged: one for every three letters of the word, at least
    one and at most three. File names are compared without the ending that they share.

    Args:
        word: What was written.
        candidates: What could have been meant.
        edits: Slips allowed, where that is less.

    Returns the nearest, of equals the first; None where none is near.
    """
    text = _plain(str(word))
    if not text or len(text) > LONGEST:
        return None
    best: tuple[int, str] | None = None
    for candidate in candidates:
        known = _plain(candidate)
        ours, theirs = text, known
        stem, dot, ending = text.rpartition(".")
        if dot and stem == known:  # a directory was meant, or a file without an ending
            return candidate
        if dot and stem and known.endswith(f".{ending}"):
            ours, theirs = stem, known.removesuffix(f".{ending}")
        allowed = min(edits, MOST_EDITS, max(1, len(ours) // 3), best[0] - 1 if best else MOST_EDITS)
        # one letter for another is a slip in a word, and another name where there is but one letter
        if min(len(ours), len(theirs)) < 2 and ours != theirs:
            continue
        distance = _distance(ours, theirs, allowed)
        if distance is not None:
            best = (distance, candidate)
            if distance == 0:
                break
    return best[1] if best else None


def _plain(text: str) -> str:
    return text.strip().lower().replace("-", "_").replace(" ", "_")


def _distance(a: str, b: str, limit: int) -> int | None:
    """Edits between two texts, an exchange of neighbours being one; None where there are more than ``limit``.

    Source: the restricted Damerau-Levenshtein distance.
    """
    if limit < 0 or abs(len(a) - len(b)) > limit or len(b) > LONGEST + MOST_EDITS:
        return None
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        last, row, older = row, [i], before
        for j, other in enumerate(b, 1):
            cost = min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and other == a[i - 2]:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        before = last
        if min(row) > limit:
            return None
    return row[-1] if row[-1] <= limit else None
