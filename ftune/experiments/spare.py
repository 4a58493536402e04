"""Checkpoints that a study needs no more: of a whole model each is gigabytes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection

from ftune.artifacts.run_dir import RunDir
from ftune.errors import RunInUse
from ftune.experiments.trials import Trials
from ftune.experiments.weights import again
from ftune.run.lock import RunLock

__all__ = ["delete_checkpoints"]


def delete_checkpoints(trials: Trials, label: str, chosen: str, keep: Collection[int]) -> None:
    """Delete the checkpoints of a method's trials, and of the runs of its chosen setting that are tested.

    To be called once the chosen trial is tested. Before that, a trial that was dropped may still be wanted, in the
    place of one that fails. Artifacts stay, so that runs can be evaluated and merged; a run that failed keeps all, to
    be tried again; one that another process reads is left for the next time.

    Args:
        trials: The study's runs.
        label: Of the method.
        chosen: Name of the chosen trial.
        keep: Its checkpoints that stay, by step.
    """
    for run in (*sorted((trials.root / "runs" / label).iterdir()), again(trials, label, chosen)):
        checkpoints = RunDir(run).checkpoints
        wanted = run.name.startswith("seed-") and not trials.tested(label, run.name)
        if wanted or not checkpoints.is_dir() or trials.failure(label, run.name).is_file():
            continue
        kept = {f"step-{step}" for step in keep} if run.name == chosen else set()
        spare = [path for path in checkpoints.iterdir() if path.name not in kept]
        if not spare:
            continue
        # Without a rename first: nothing reads them any more, and what a kill leaves is deleted the next time.
        with contextlib.suppress(RunInUse), RunLock(run):
            for path in spare if kept else [checkpoints]:
                shutil.rmtree(path, ignore_errors=True)
