"""Long documents as windows in which every token is learned once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ftune.data.examples import Ids

__all__ = ["windows"]


def windows(
    ids: Ids, trained: NDArray[np.bool_], max_length: int, lead: Sequence[int]
) -> list[tuple[Ids, NDArray[np.bool_]]]:
    """Cut a document into examples of at most ``max_length`` tokens, every trained token of which is trained in one.

    ids: (L,) int32; trained: (L,) bool. A window's first token has nothing before it to be predicted from, so each
    window but the first begins with the last token of the one before, which is context there. ``lead`` (tokens that
    the tokenizer puts before every text) stands at the start of each, never trained behind the first.
    """
    first = len(lead) if list(ids[: len(lead)]) == list(lead) else 0
    # a window of nothing but its lead and the token before would teach nothing
    before = np.array(lead if first and max_length > len(lead) + 1 else [], dtype=np.int32)
    found = [(ids[:max_length], trained[:max_length])]
    start = max_length
    while start < len(ids):
        end = start + max_length - len(before) - 1
        window = np.concatenate([before, ids[start - 1 : end]])
        mask = np.concatenate([np.zeros(len(before) + 1, np.bool_), trained[start:end]])
        found.append((window, mask))
        start = end
    return found
