"""Ten losses of every method on the tiny model: a change in the mathematics shows here first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from ftune.artifacts.training import train
from ftune.methods import METHODS

GOLDEN = Path(__file__).parent / "golden_losses.json"


@pytest.mark.parametrize("name", METHODS)
def test_ten_losses(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    train(tiny.recipe(tmp_path, name, training={"max_steps": 10}))
    found = [round(event["loss"], 6) for event in tiny.events(tmp_path / "run", "step")]
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--record-golden"):
        GOLDEN.write_text(json.dumps(known | {name: found}, indent=1) + "\n")
        return
    # Summation order differs between processors, and ten updates let it grow.
    assert found == pytest.approx(known[name], rel=2e-3)
