"""What seeds add, learned from all methods of a study."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ftune.artifacts.paired import difference, paired
from ftune.experiments.seeds import SeedNoise, differences


def study(**by_seed: list[float]) -> dict[str, NDArray[np.float64]]:
    """Scores of 400 items, on which alone the seeds differ."""
    return {name: np.full((1, 400), 1.0) * np.array(rows)[:, None] for name, rows in by_seed.items()}


def test_of_two_methods_what_they_have_is_taken() -> None:
    rng = np.random.default_rng(0)
    known = {"lora": rng.uniform(size=(3, 50)), "dora": rng.uniform(size=(3, 50)), "base": rng.uniform(size=(1, 50))}
    d_SN = paired(known["dora"], known["lora"])
    assert SeedNoise(known).of(("dora", "lora")) == pytest.approx((d_SN.mean(axis=1).var(ddof=1), 2))
    assert differences(known, [("dora", "lora")], 0.05)["dora", "lora"] == difference(d_SN)


def test_seeds_that_agree_by_chance_do_not_make_a_difference_certain() -> None:
    level = {"base": [0.5], "lora": [0.50, 0.52, 0.54], "dora": [0.55, 0.57, 0.59]}
    pair = ("dora", "lora")
    assert differences(study(**level), [pair], 0.05)[pair].p < 1e-6
    others = {"ia3": [0.55, 0.60, 0.50], "vera": [0.40, 0.50, 0.45], "oft": [0.5, 0.45, 0.52]}
    assert 0.01 < differences(study(**level, **others), [pair], 0.05)[pair].p < 0.2


def test_what_a_seed_does_to_all_methods_is_no_noise_between_them() -> None:
    level = {"lora": [0.50, 0.51, 0.50], "dora": [0.52, 0.52, 0.53], "ia3": [0.41, 0.40, 0.41]}
    quiet = SeedNoise(study(**level))
    moved = SeedNoise(study(**{name: [a + 0.1, b - 0.2, c] for name, (a, b, c) in level.items()}))
    assert moved.of(("dora", "lora")) == pytest.approx(quiet.of(("dora", "lora")))
    assert moved.of(("base", "lora"))[0] > 100 * quiet.of(("base", "lora"))[0]  # type: ignore[index]


def test_one_wild_method_does_not_hide_the_others() -> None:
    rng = np.random.default_rng(0)
    level = {f"m{i}": list(0.5 + rng.normal(size=3) * 0.01) for i in range(8)}
    wild = {**level, "m7": [0.1, 0.9, 0.4]}
    calm, beside = (SeedNoise(study(**of)).of(("m0", "m1")) for of in (level, wild))
    assert beside[0] < 10 * calm[0]  # type: ignore[index]
    assert SeedNoise(study(**wild)).of(("m0", "m7"))[0] > 100 * calm[0]  # type: ignore[index]


def test_failed_runs_and_methods_without_noise() -> None:
    level = {"lora": [0.50, 0.51, 0.53], "dora": [0.52, 0.51, np.nan], "ia3": [0.4, 0.4, 0.4]}
    left = SeedNoise(study(**level))
    assert left.of(("dora", "lora"))[1] < 2  # type: ignore[index]
    assert SeedNoise(study(**{name: rows[:2] for name, rows in level.items()})).of(("dora", "lora")) == left.of(
        ("dora", "lora")
    )
    assert SeedNoise(study(**{**level, "dora": [0.52, np.nan, np.nan]})).of(("lora", "ia3")) is None
    assert SeedNoise(study(lora=[0.5, 0.5, 0.5], dora=[0.6, 0.6, 0.6])).of(("dora", "lora")) == (0.0, 2.0)
    assert SeedNoise(study(lora=[0.5], dora=[0.6])).of(("dora", "lora")) is None
