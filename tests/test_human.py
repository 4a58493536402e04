from __future__ import annotations

import pytest

from ftune.human import bytes_text, time_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (18.7 * 2**20, "18.7 MiB"),
        (300 * 2**20, "300 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**40, "1 TiB"),
    ],
)
def test_bytes_have_three_digits(value: float, text: str) -> None:
    assert bytes_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3599.6, "1h00m"), (7620, "2h07m")],
)
def test_seconds_have_two_units(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
