"""A study is cut to its budget: its runs are shorter, its answers are not fewer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import yaml

from ftune.errors import FtuneError
from ftune.experiments.forecast import FORGETTING_TOKENS, READING, fitted, make_forecast
from ftune.experiments.study import load_study
from ftune.experiments.trials import Trials


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


def test_forgetting_is_counted_in_what_a_study_takes(tmp_path: Path) -> None:
    settled: Any = SimpleNamespace(
        steps=40,
        tokens_a_step=200.0,
        priors={"lora": 1e-3, "ia3": 1e-2},
        counts={"validation": 8, "test": 8},
        test_items=8,
    )
    trials = Trials(tmp_path, cast(Any, None), {}, {}, "f1", 7)
    speeds = {"lora": {"seconds": 2.0, "bytes": 1.0}, "ia3": {"seconds": 1.0, "bytes": 1.0}}
    found = {}
    for forgetting in (True, False):
        study = {"recipe": str(tiny.recipe_to_compare(tmp_path)), "methods": ["lora", "ia3"], "forgetting": forgetting}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        loaded = load_study(tmp_path / "study.yaml")
        found[forgetting] = make_forecast(loaded, settled, trials, speeds, begun=False)
    more = 2 * FORGETTING_TOKENS * READING * 1.0 / 200
    assert found[True].seconds - found[False].seconds == pytest.approx(more)
    assert found[True].besides - found[False].besides == pytest.approx(more), "shorter runs do not save it"
