"""The verdict is wrong no more often than it says, and finds what it foretold (more: scripts/calibrate_verdict.py)."""

from __future__ import annotations

import numpy as np
import pytest
from experiments_studies import study
from scipy import stats

from ftune.artifacts.paired import checked, difference, paired
from ftune.experiments.against import compare, related
from ftune.experiments.power import detectable, needed
from ftune.experiments.verdict import judge

STUDIES = 200


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("items", [200, 1000])
def test_where_no_method_is_better_none_is_called_so(seeds: int, items: int) -> None:
    noise = 0.03 if seeds > 1 else 0.0  # of one seed the verdict is about the runs, whose seeds' noise is real
    rng, false = np.random.default_rng(items + seeds), 0
    for _ in range(STUDIES):
        scores = study(rng, methods=4, seeds=seeds, items=items, seed_noise=noise)
        verdict = judge(scores, base="base", reference="lora", margin=0.01)
        false += verdict.kind == "better" and bool({*verdict.group} - {"lora", "base"})
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
    found = 0
    for _ in range(STUDIES):
        known = checked(study(rng, seeds=seeds, items=items, better_by=0.04, **made), "base")  # type: ignore[arg-type]
        found += "m0" in related(compare(known, known, "lora", margin=0.01, alpha=0.05), "better")
    # 80 % of 200 is 160; a chance of 80 % gives fewer than 151 in 5 % of all cases
    assert found >= stats.binom.ppf(0.05, STUDIES, 0.8)
