"""One line for each method: what it needs, whether it fits, and why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from ftune.experiments.fits import Fit, fits, fits_table
from ftune.methods import METHODS
from ftune.plan.devices import find_device
from ftune.plan.resolve import resolve
from ftune.plan.summary import summary_of


def test_each_method_is_planned_as_a_recipe_of_its_own(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, "lora")
    found = {fit.method: fit for fit in fits(loaded, list(METHODS))}
    summary = summary_of(resolve(loaded.recipe))
    assert found["lora"].bytes == summary["memory"]["total"]
    assert found["lora"].rate == summary["training"]["learning_rate"] == 1e-2
    # Another method has its own rate, not the one that was given for the recipe's.
    assert found["ia3"].rate == pytest.approx(METHODS["ia3"].default_learning_rate, rel=20)
    assert found["ia3"].rate != 1e-2
    assert found["full"].trainable is not None
    assert found["full"].trainable > (found["lora"].trainable or 0)
    assert {fit.verdict for fit in found.values()} <= {"fits", None}
    assert all(fit.why for fit in found.values() if fit.verdict is None)


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    loaded = tiny.recipe(tmp_path, "lora")
    (found,) = fits(loaded, ["full"], target=find_device("0.001GiB"))
    assert found.verdict == "does not fit"
    assert found.why


def test_the_table_has_what_fits_first() -> None:
    text = fits_table(
        [
            Fit("a", None, "no"),
            Fit("b", "does not fit", "--set x", 9),
            Fit("c", "fits", "", 5),
            Fit("d", "fits", "", 4),
        ],
        80,
    )
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["d", "c", "b", "a"]
    assert lines[-2:] == ["b: --set x", "a: no"]
