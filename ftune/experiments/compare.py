"""Run a study: settle what its runs have in common, tune every method alike, then judge them on the test rows."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ftune.artifacts.tasks import load_tasks
from ftune.artifacts.validation import checked_splits
from ftune.errors import RunInUse
from ftune.experiments.collect import collect
from ftune.experiments.drift import Environment
from ftune.experiments.forecast import Forecast, fitted, make_forecast
from ftune.experiments.pool import Pool
from ftune.experiments.ray_pool import RayPool
from ftune.experiments.settle import load_settled, settle, store_settled
from ftune.experiments.study import LoadedStudy
from ftune.experiments.times import Clock, times
from ftune.experiments.worklist import Worklist
from ftune.plan.base_model import load_tokenizer
from ftune.recipe import load_recipe
from ftune.run.lock import RunLock, is_orphaned

__all__ = ["compare"]


def compare(
    loaded: LoadedStudy,
    *,
    devices: Sequence[int] = (),
    ray: bool = False,
    agree: Callable[[Forecast], bool] = lambda forecast: True,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any] | None:
    """Run a study, or go on with it; returns what ``compare.json`` holds, or None where ``agree`` says no.

    Args:
        loaded: The study.
        devices: Numbers of the GPUs to use, a run at a time on each; none: one run at a time.
        ray: Run on a Ray cluster, a run on each of its devices.
        agree: Asked before anything but a few steps is trained.
        tell: Called with a line for each thing that is done.

    Raises:
        FtuneError: The study cannot be run, or does not fit its budget.
        Interrupted: A signal came; what was done is kept, and the same command goes on.
    """
    clock = Clock(loaded.root)
    # Checked with each method's settings, and with the rows that are held out: the recipe may have none.
    base = load_recipe(Path(loaded.study.recipe).expanduser())
    loaded.root.mkdir(parents=True, exist_ok=True)
    with _locked(loaded.root, tell) as lock:
        settled = load_settled(loaded, base)
        begun = settled is not None
        if settled is not None and loaded.study.budget is not None:
            tell(f"the study has begun: its runs keep their {settled.steps} steps, whatever the budget")
        if settled is None:
            if loaded.study.tasks:
                load_tasks(loaded.study.tasks)  # what is wrong with them is told before hours of training
            # Told of the user's files, not of those that the study draws from them.
            checked_splits(base.recipe, load_tokenizer(base.recipe.model, base.recipe.data.chat_template))
            settled = settle(loaded, base)
        work = Worklist(loaded, base, settled, begun, clock)
        log = loaded.root / "workers.log"
        with RayPool(log, tell) if ray else Pool(devices, log, lock=lock.fileno(), fork=_may_fork()) as pool:
            now = pool.environment() if isinstance(pool, RayPool) else Environment.here(devices)
            work.require_agreement(pool, now, tell)
            pool.do(work.first_jobs, work.note(tell))
            forecast = make_forecast(loaded, settled, work.trials, work.speeds(), begun=begun)
            if not begun:
                fitting = fitted(forecast, loaded.study.budget)
                if fitting != settled.steps:
                    whole, settled = settled.steps, settle(loaded, base, steps=fitting)
                    work = Worklist(loaded, base, settled, begun, clock)
                    speeds = work.speeds()
                    forecast = make_forecast(loaded, settled, work.trials, speeds, begun=begun, cut_from=whole)
            if not agree(forecast):
                return None
            store_settled(loaded, settled)
            pool.do(work.jobs, work.note(tell))
            return collect(loaded, work.trials, settled, work.outcomes(), work.speeds(), times(loaded.root))


@contextlib.contextmanager
def _locked(root: Path, tell: Callable[[str], None]) -> Iterator[RunLock]:
    """Hold a study's lock. Its workers hold it too: where they outlived one that was killed, their end is waited for.

    Raises:
        RunInUse: Another process works on the study.
    """
    lock, told = RunLock(root), False
    with contextlib.ExitStack() as held:
        while True:
            try:
                held.enter_context(lock)
                break
            except RunInUse:
                if not is_orphaned(root):
                    raise
            if not told:
                tell("waiting for the session that was killed: its runs save the step that they are in")
            told = True
            time.sleep(0.2)
        yield lock


def _may_fork() -> bool:
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()
