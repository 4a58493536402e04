"""Best-fit decreasing."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data.packing import fill, pack


@given(st.integers(1, 64).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_document_is_in_one_row_and_every_row_fits(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = pack(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    totals = [sum(lengths[document] for document in row) for row in rows]
    assert all(0 < total <= capacity for total in totals)
    # no two rows could have been one: what any fitting heuristic promises
    smallest = sorted(totals)[:2]
    assert len(smallest) < 2 or sum(smallest) > capacity
    assert rows == pack(lengths, capacity)


@given(st.lists(st.integers(1, 30), max_size=40))
def test_rows_are_those_of_the_textbook(lengths: list[int]) -> None:
    """Compare with best fit written down plainly: a scan over all rows for the tightest that fits."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(30 - length)
    assert sorted(30 - sum(lengths[d] for d in row) for row in pack(lengths, 30)) == sorted(free)


def mixes() -> dict[str, np.ndarray]:
    random = np.random.RandomState(0)
    return {
        "chats": np.clip(random.lognormal(5, 0.8, 5000), 16, 1024),
        "long tail": np.clip(random.pareto(1.2, 5000) * 60 + 20, 20, 1024),
        "uniform": random.uniform(40, 512, 5000),
    }


@pytest.mark.parametrize("mix", mixes())
def test_realistic_mixes_fill_their_rows(mix: str) -> None:
    lengths = [int(length) for length in mixes()[mix]]
    assert fill(lengths, pack(lengths, 1024), 1024) >= 0.97


def test_a_hundred_thousand_documents_take_seconds() -> None:
    lengths = [int(x) for x in np.clip(np.random.RandomState(1).lognormal(6, 1, 100_000), 1, 8192)]
    start = time.process_time()
    pack(lengths, 8192)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("lengths", [[5, 0], [9]])
def test_what_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 8 tokens"):
        pack(lengths, 8)
