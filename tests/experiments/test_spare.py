"""Which checkpoints a study deletes, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from ftune.experiments.spare import delete_checkpoints
from ftune.experiments.trials import Trials
from ftune.run.lock import RunLock


@pytest.fixture
def trials(tmp_path: Path) -> Trials:
    """A tuned method: `rate-2` was chosen and tested, `rate-3` failed, of the other seeds `seed-8` is tested."""
    made = Trials(tmp_path, cast(Any, None), {}, {}, "f1", 7)
    (tmp_path / "recipes/full").mkdir(parents=True)
    for name in ("rate-1", "rate-2", "rate-3", "seed-8", "seed-9"):
        for step in (1, 2, 4):
            checkpoint = made.run("full", name) / f"checkpoints/step-{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "trained.safetensors").write_text("many")
        (made.run("full", name) / "model").mkdir()
    for name in ("rate-2", "seed-8"):
        made.test("full", name).mkdir(parents=True)
        (made.test("full", name) / "predictions.jsonl").write_text("")
    made.fail("full", "rate-3", "out of memory")
    return made


def left(trials: Trials) -> dict[str, list[str]]:
    """The checkpoints of each run that has any."""
    found = sorted(trials.root.glob("runs/full/*/checkpoints/*"))
    return {path.parts[-3]: [p.name for p in sorted(path.parent.iterdir())] for path in found}


EVERY = ["step-1", "step-2", "step-4"]


def test_a_run_that_may_still_go_on_keeps_its_checkpoints(trials: Trials) -> None:
    delete_checkpoints(trials, "full", "rate-2", keep=())
    assert left(trials) == {"rate-3": EVERY, "seed-9": EVERY}
    assert len(list(trials.root.glob("runs/full/*/model"))) == 5, "what was trained stays"


def test_the_chosen_trial_keeps_what_is_rewound(trials: Trials) -> None:
    delete_checkpoints(trials, "full", "rate-2", keep=(1, 2))
    assert left(trials) == {"rate-2": ["step-1", "step-2"], "rate-3": EVERY, "seed-9": EVERY}


def test_a_run_that_is_read_is_left_for_the_next_time(trials: Trials) -> None:
    with RunLock(trials.run("full", "rate-1")):
        pass  # which makes the file that a reader shares
    with RunLock(trials.run("full", "rate-1"), shared=True):
        delete_checkpoints(trials, "full", "rate-2", keep=())
    assert left(trials)["rate-1"] == EVERY
    (trials.run("full", "rate-1") / "checkpoints/step-1/trained.safetensors").unlink()  # as a kill leaves it
    delete_checkpoints(trials, "full", "rate-2", keep=())
    assert "rate-1" not in left(trials)
