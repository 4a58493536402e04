"""The verdict is wrong no more often than it says, and finds what it foretold (more: scripts/calibrate_verdict.py)."""

from __future__ import annotations

import numpy as np
import pytest
from experiments_studies import study
from scipy import stats

from ftune.experiments.paired import difference, paired
from ftune.experiments.power import detectable, needed
from ftune.experiments.verdict import judge

STUDIES = 200


def times_better(verdicts: int, rng: np.random.Generator, name: str | None = None, **made: float) -> int:
    """In how many studies a method, the named one or any, is called better than LoRA."""
    count = 0
    for _ in range(verdicts):
        verdict = judge(study(rng, **made), base="base", reference="lora", margin=0.01)  # type: ignore[arg-type]
        found = [x for x, one in verdict.comparisons.items() if one.relation == "better" and x != "base"]
        count += name in found if name else bool(found)
    return count


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("items", [200, 1000])
def test_where_no_method_is_better_none_is_called_so(seeds: int, items: int) -> None:
    noise = 0.03 if seeds > 1 else 0.0  # of one seed the verdict is about the runs, whose seeds' noise is real
    false = times_better(
        STUDIES, np.random.default_rng(items + seeds), methods=4, seeds=seeds, items=items, seed_noise=noise
    )
    # 5 % of 200 is 10; a rate of 5 % gives more than 15 in 5 % of all cases
    assert false <= stats.binom.ppf(0.95, STUDIES, 0.05)


@pytest.mark.parametrize(("seeds", "noise"), [(1, 0.0), (3, 0.0), (5, 0.005)])
def test_a_difference_that_was_foretold_as_detectable_is_found(seeds: int, noise: float) -> None:
    rng = np.random.default_rng(seeds)
    made = {"methods": 4, "seed_noise": noise}
    earlier = study(rng, seeds=100, items=3000, **made)  # type: ignore[arg-type]
    spread = difference(paired(earlier["m0"], earlier["lora"])).spread
    items = needed(0.04, spread, seeds, comparisons=5)
    assert items is not None
    assert detectable(items, spread, seeds, comparisons=5) == pytest.approx(0.04, abs=2e-4)
    found = times_better(STUDIES, rng, "m0", seeds=seeds, items=items, better_by=0.04, **made)
    # 80 % of 200 is 160; a chance of 80 % gives fewer than 151 in 5 % of all cases
    assert found >= stats.binom.ppf(0.05, STUDIES, 0.8)
