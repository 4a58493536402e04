"""A study is cut to its budget: its runs are shorter, its answers are not fewer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ftune.errors import FtuneError
from ftune.experiments.forecast import fitted


@pytest.mark.parametrize(
    ("budget", "steps"),
    # 1,000 steps of 10 s, 2,000 s besides, 100 tokens a step
    [("4h", 100), ("7000s", 50), ("700 steps", 70), ("40k tokens", 40), ("2500s", None), ("1000s", None)],
)
def test_what_is_left_for_steps(budget: str, steps: int | None) -> None:
    settled = SimpleNamespace(steps=100, tokens_a_step=100)
    forecast: Any = SimpleNamespace(
        settled=settled, seconds=12_000.0, besides=2_000.0, steps=1_000, labels=("lora", "ia3")
    )
    if steps is None:
        with pytest.raises(FtuneError, match="would show nothing"):
            fitted(forecast, budget)
    else:
        assert fitted(forecast, budget) == steps
