"""What a study's worker answers where a job does not come to its end."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from ftune.errors import FtuneError, RunInUse
from ftune.experiments import worker


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (RunInUse("runs/a is in use by another process"), {"busy": "runs/a is in use by another process"}),
        (FtuneError("no such recipe"), {"failed": "no such recipe"}),
    ],
)
def test_a_run_that_is_in_use_has_not_failed(
    error: FtuneError, answer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(job: Any) -> dict[str, float]:
        raise error

    monkeypatch.setattr(worker, "_train", refuse)
    assert worker._done({"kind": "train"}) == answer


def test_a_child_that_gives_no_result_leaves_its_traceback() -> None:
    script = """
import json, sys
from ftune.experiments import worker
def leave(job): raise KeyboardInterrupt("somewhere")
worker._train = leave
print(json.dumps(worker._in_child({"kind": "train"})))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"failed": "the process ended with exit code 1: see workers.log"}
    assert "KeyboardInterrupt: somewhere" in done.stderr
