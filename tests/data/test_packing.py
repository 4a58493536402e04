"""Best-fit decreasing, and subset sums where it wastes places."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftune.data import packing
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
    assert len(rows) <= len(packing._best_fit(lengths, capacity))
    assert rows == pack(lengths, capacity)


@given(st.integers(30, 70).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(c // 8, c), max_size=60))))
def test_rows_longer_than_the_units_they_are_counted_in_fit_too(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "UNITS", 16)
        patch.setattr(packing, "PARTS", 3)
        patch.setattr(packing, "TOLERANCE", 0)
        rows = pack(lengths, capacity)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    totals = sorted(sum(lengths[document] for document in row) for row in rows)
    assert all(total <= capacity for total in totals)
    assert len(rows) < 2 or totals[0] + totals[1] > capacity
    assert len(rows) <= len(packing._best_fit(lengths, capacity))


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 40))
def test_a_subset_sum_finds_the_largest_sum(lengths: list[int], room: int) -> None:
    """Compare with all subsets, written down plainly."""
    left = {length: lengths.count(length) for length in sorted(lengths, reverse=True)}
    chosen = packing._subset(list(left), left, room, 0)
    assert all(times <= left[length] for length, times in chosen.items())
    sums = {0}
    for length in lengths:
        sums |= {total + length for total in sums}
    assert sum(length * times for length, times in chosen.items()) == max(total for total in sums if total <= room)


@given(st.lists(st.integers(1, 30), max_size=40))
def test_best_fit_is_that_of_the_textbook(lengths: list[int]) -> None:
    """Compare with best fit written down plainly: a scan over all rows for the tightest that fits."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free[free.index(min(fitting))] -= length
        else:
            free.append(30 - length)
    assert sorted(30 - sum(lengths[d] for d in row) for row in packing._best_fit(lengths, 30)) == sorted(free)


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


# documents of the quickstart with 102, 103, ... 193 tokens
QUICKSTART = (
    "1 0 0 0 1 0 2 0 2 3 5 4 8 7 6 3 8 13 6 5 10 9 10 9 6 4 9 3 8 5 11 3 9 7 6 3 5 4 5 3 4 2 6 "
    "1 1 2 1 3 1 1 1 0 0 1 0 3 1 1 0 1 2 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 1 0 0 1 0 0 0 1 0 0 0 0 0 1"
)


def quickstart() -> list[int]:
    return [tokens for tokens, count in enumerate(map(int, QUICKSTART.split()), 102) for _ in range(count)]


def alike(count: int, capacity: int) -> list[int]:
    """Documents of about a quarter of a row, where four are just too many and three leave a quarter empty."""
    drawn = np.random.RandomState(2).normal(capacity / 3.95, capacity / 35, count)
    return [int(length) for length in np.clip(drawn, 1, capacity)]


@pytest.mark.parametrize(
    ("lengths", "capacity"),
    [(quickstart(), 512), (quickstart(), 1024), (alike(1000, 512), 512), (alike(3000, 32768), 32768)],
    ids=["quickstart", "quickstart, long rows", "alike", "alike, counted in units"],
)
def test_documents_of_like_lengths_fill_their_rows(lengths: list[int], capacity: int) -> None:
    assert fill(lengths, packing._best_fit(lengths, capacity), capacity) < 0.96
    rows = pack(lengths, capacity)
    assert fill(lengths, rows, capacity) >= 0.97
    assert len(rows) <= math.ceil(sum(lengths) / capacity) * 1.03


def test_rows_that_fit_into_one_are_joined() -> None:
    assert packing._joined([[0], [1], [2]], [3, 3, 5], capacity=6) == [[2], [0, 1]]


def test_what_cannot_be_packed_stays_apart() -> None:
    assert pack([307] * 50, 512) == [[i] for i in range(50)]


@pytest.mark.parametrize("capacity", [512, 131072])
def test_the_work_grows_with_the_distinct_lengths_alone(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No packing is good enough here, so every way is tried; and a subset sum has few and short integers to add."""
    lengths = [int(x) for x in np.random.RandomState(1).uniform(0.3 * capacity, 0.4 * capacity, 20_000)]
    parts: list[int] = []
    rooms: list[int] = []
    original = packing._parts

    def counted(order: list[int], left: dict[int, int], room: int) -> list[tuple[int, int]]:
        found = list(original(order, left, room))
        parts.append(len(found))
        rooms.append(room)
        return found

    monkeypatch.setattr(packing, "_parts", counted)
    rows = pack(lengths, capacity)
    assert len(rows) > 1.1 * sum(lengths) / capacity
    distinct = min(len(set(lengths)), 4096)
    assert len(parts) <= len(packing.SLACKS) * 3 * distinct
    assert max(parts) <= 512
    assert max(rooms) <= 4096


@pytest.mark.parametrize("lengths", [[5, 0], [9]])
def test_what_fits_no_row_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit rows of 8 tokens"):
        pack(lengths, 8)
