"""The jobs of a study: what it has made so far, read from its directory, and what is to be done next."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune.errors import FtuneError
from ftune.experiments.drift import Anchor, Environment, environments, keep_environments, refusal
from ftune.experiments.pool import Job, Pool
from ftune.experiments.ray_pool import RayPool
from ftune.experiments.rewind import paused_steps, rewind_jobs
from ftune.experiments.rows import forget_measured
from ftune.experiments.settle import Settled
from ftune.experiments.spare import delete_checkpoints
from ftune.experiments.study import BASE, Candidate, LoadedStudy
from ftune.experiments.times import Clock
from ftune.experiments.trials import Trials
from ftune.experiments.tuning import (
    WIDENED,
    Outcome,
    Progress,
    Setting,
    Want,
    grid,
    next_wants,
    steps_of_tuning,
)
from ftune.experiments.weights import again_job, has_weights, keep_size, run_with_weights
from ftune.recipe import Loaded

__all__ = ["Worklist"]

SPEED_SHARE = 0.05
"""Steps that are made to measure time and memory, as a share of those that tuning a method takes."""
SPEED_STEPS, SPEED_ROUNDS = 4, 2
"""Of a method, at most."""
KEPT_TO_REWIND = 6
"""Checkpoints of a trial that stay where runs are rewound: of both pauses, of the end, and of a few interruptions."""
WAIT_SECONDS = 3.0
"""Until a run that another command holds is tried again."""


class Worklist:
    """What a study has made so far, and the jobs that it still needs.

    Args:
        loaded: The study.
        base: Its recipe.
        settled: What its runs have in common.
        begun: Whether it has begun before.
        clock: Keeps how long its jobs take.
    """

    def __init__(self, loaded: LoadedStudy, base: Loaded, settled: Settled, begun: bool, clock: Clock) -> None:
        self.loaded, self.settled, self.begun, self.clock = loaded, settled, begun, clock
        keep = KEPT_TO_REWIND if loaded.study.rewind else 1
        self.trials = Trials(loaded.root, base, settled.common, settled.own, settled.metric, settled.seed, keep)
        self.candidates = [c for c in loaded.candidates if c.label in settled.priors]
        self.seeds = settled.seeds(loaded.study.seeds)
        combinations = math.prod(len(values) for values in loaded.study.search.values())
        few = max(2, math.floor(SPEED_SHARE * steps_of_tuning(loaded.study.trials, combinations, settled.steps)))
        self.speed_steps = min(few, SPEED_STEPS, settled.steps)
        self.speed_rounds = max(1, min(few // SPEED_STEPS, SPEED_ROUNDS))

    def require_agreement(self, pool: Pool | RayPool, now: Environment, tell: Callable[[str], None]) -> None:
        """Hold that what is computed here and now agrees with what the study has (``ftune.experiments.drift``).

        Raises:
            RunDirError: It does not.
        """
        root, kept = self.trials.root, environments(self.trials.root)
        then = kept[-1] if kept else None
        if not self.begun:
            if then is None or not then.equals(now):
                forget_measured(root)  # of a study that was only planned
                keep_environments(root, [now])
            return
        measures = bool(self.first_jobs())
        if (then is not None and then.holds(now)) or not (measures or self.jobs()):
            return
        tell("the study goes on with other versions, elsewhere or on another day: its anchor is computed again")
        anchor = Anchor(self.trials, self.settled)

        def done(job: Job, result: Mapping[str, Any]) -> None:
            if why := result.get("failed"):
                raise refusal(root, then, now, [f"{job.label}: {why}"])

        shutil.rmtree(anchor.root, ignore_errors=True)
        pool.do(anchor.jobs, done)
        if differences := anchor.differences():
            raise refusal(root, then, now, differences)
        shutil.rmtree(anchor.root, ignore_errors=True)
        tell("the anchor agrees")
        if measures or then is None or not then.equals(now):
            # Time and memory are compared only where all were measured in one place at one time.
            shutil.rmtree(root / "speed", ignore_errors=True)
        if then is not None and then.equals(now):
            keep_environments(root, [*kept[:-1], replace(then, checked=now.checked)])
        else:
            keep_environments(root, [*kept, now])

    def first_jobs(self) -> list[Job]:
        """What is measured before the study: a few steps of each method in turns, and the base on the test rows.

        Of a study that has not begun, what was measured of another recipe goes.
        """
        # One at a time, so that none disturbs another.
        for number in range(self.speed_rounds):
            for candidate in self.candidates:
                if self.begun and self._speed(candidate, number) is not None:
                    continue
                recipe = self._speed_recipe(candidate, number)
                failed = self.trials.progress(candidate.label, "speed").failed
                if self._speed(candidate, number) is None and not failed:
                    message = {"kind": "train", "recipe": str(recipe), "until": self.speed_steps}
                    return [Job(candidate.label, f"speed {number}", message, alone=True)]
        if self.begun and self.trials.tested(BASE, BASE):
            return []
        recipe = self._base_recipe()
        if not self.trials.tested(BASE, BASE):
            return [self._test_job(BASE, BASE, {"run": None, "recipe": str(recipe), "forgetting": False})]
        return []

    def _speed(self, candidate: Candidate, number: int) -> dict[str, float] | None:
        return self.trials.speed(candidate.label, number, self.speed_steps)

    def jobs(self) -> list[Job]:
        """What can be done now, methods side by side; what no job needs any more is deleted."""
        of_base = self._task_jobs(BASE, BASE, {"run": None, "recipe": str(self.trials.recipe(BASE, BASE))})
        return [*of_base, *(job for candidate in self.candidates for job in self._jobs_of(candidate))]

    def _jobs_of(self, candidate: Candidate) -> list[Job]:
        label = candidate.label
        wants, outcome, _ = self._next(candidate)
        jobs = [self._wanted(candidate, want) for want in wants]
        if outcome is not None and outcome.best is not None:
            for seed in self.seeds:
                jobs += self._seed_jobs(candidate, outcome.best, seed)
            if self.trials.tested(label, outcome.best.name):  # which may measure the end's forgetting
                # Before any job reads them.
                keep = paused_steps(self.settled.steps) if self.loaded.study.rewind else ()
                delete_checkpoints(self.trials, label, outcome.best.name, keep)
                jobs += self._later_jobs(candidate, outcome.best.name)
        return jobs

    def _wanted(self, candidate: Candidate, want: Want) -> Job:
        """What tuning wants of a trial."""
        name, recipe = self.trials.trial(candidate, want.setting)
        run = self.trials.run(candidate.label, name)
        if want.until is None and has_weights(run):
            return Job(candidate.label, name, {"kind": "evaluate", "run": str(run)})
        return self._train_job(candidate.label, name, recipe, want.until or self.settled.steps)

    def _seed_jobs(self, candidate: Candidate, best: Setting, seed: int) -> list[Job]:
        """What is to be done for the chosen setting with one seed: it is trained, then tested."""
        label = candidate.label
        name, recipe = self.trials.trial(candidate, best, seed)
        if self.trials.progress(label, name).failed:
            return []
        run = self.trials.run(label, name)
        if self.trials.tested(label, name):
            keep_size(self.trials, label, name)
            return []
        if not has_weights(run):
            return [self._train_job(label, name, recipe, self.settled.steps)]
        # Of one run of each method: it takes as long as hundreds of answers.
        first = seed == self.settled.seed
        what = {"forgetting": self.loaded.study.forgetting and first, "exports": first}
        return [self._test_job(label, name, {"run": str(run), **what})]

    def _later_jobs(self, candidate: Candidate, name: str) -> list[Job]:
        """Tasks and rewinding of a tested run: they may be asked for when its weights are gone."""
        label, steps = candidate.label, self.settled.steps
        run = run_with_weights(self.trials, label, name)
        jobs = self._task_jobs(label, name, {"run": str(run)})
        if self.loaded.study.rewind:
            jobs += rewind_jobs(self.trials, label, candidate.method, name, steps)
        if run is None and jobs:
            return [job] if (job := again_job(self.trials, label, name, paused_steps(steps))) else []
        return jobs

    def _next(self, candidate: Candidate) -> tuple[list[Want], Outcome | None, dict[Setting, Progress]]:
        """What tuning wants next, or what it found; and how far each trial has come."""
        study, label = self.loaded.study, candidate.label
        # Every setting that could be on the grid, for how far it has come is only known by its name.
        settings = grid(self.settled.priors[label], study.trials, study.search, wider=WIDENED)
        done = {setting: self.trials.progress(label, setting.name) for setting in settings}
        wants, outcome = next_wants(self.settled.priors[label], study.trials, study.search, self.settled.steps, done)
        return wants, outcome, done

    def outcomes(self) -> dict[str, tuple[Outcome, dict[Setting, Progress]]]:
        """What tuning found for each method, and how far each of its trials came."""
        found = {}
        for candidate in self.candidates:
            _, outcome, done = self._next(candidate)
            assert outcome is not None, "collected before tuning ended"
            found[candidate.label] = (outcome, done)
        return found

    def speeds(self) -> dict[str, dict[str, float]]:
        """Of each method the seconds of a step, the median of its rounds, and the bytes of its peak."""
        found = {}
        for candidate in self.candidates:
            rounds = [r for n in range(self.speed_rounds) if (r := self._speed(candidate, n)) is not None]
            if rounds:
                middle = statistics.median(r["seconds"] for r in rounds)
                found[candidate.label] = {"seconds": middle, "bytes": max(r["bytes"] for r in rounds)}
        return found

    def note(self, tell: Callable[[str], None]) -> Callable[[Job, Mapping[str, Any]], None]:
        """Keep what became of a job, and tell of it. A run that is in use is waited for: its job comes again."""
        awaited: set[tuple[str, str]] = set()

        def done(job: Job, result: Mapping[str, Any]) -> None:
            run = (job.label, job.name)
            if in_use := result.get("busy"):
                if run not in awaited:
                    tell(f"{job.label} {job.name}: waiting: {in_use}")
                    awaited.add(run)
                time.sleep(WAIT_SECONDS)
                return
            awaited.discard(run)
            self.clock.keep(job, result)
            if job.alone:  # a whole model's are gigabytes, and no more than time and memory is wanted
                shutil.rmtree(
                    self._speed_run(job.label, job.name.rpartition(" ")[2]) / "checkpoints", ignore_errors=True
                )
            tasks = job.message["kind"] == "tasks"
            why = result.get("failed")
            if tasks and not why and self.trials.task_scores(job.label, job.name, self.loaded.study.tasks) is None:
                why = (
                    "the items of the tasks are not those that the base was measured on. To measure all again, delete "
                    f"{self.trials.test(BASE, BASE) / 'tasks.json'} and {self.trials.failure(job.label, 'tasks')}"
                )
            if why:
                if job.label == BASE and not tasks:
                    raise FtuneError(f"the model before training cannot be measured: {why}")
                # A run that fails at a task has its other results.
                what = "speed" if job.alone else "tasks" if tasks else job.name
                self.trials.fail(job.label, what, str(why))
                tell(f"{job.label} {job.name}: failed: {str(why).splitlines()[0]}")
            else:
                anew = ", from the beginning: its weights were not there" if result.get("anew") else ""
                tell(f"{job.label} {job.name}: {self._said(job)}{anew}")

        return done

    def _said(self, job: Job) -> str:
        kind, progress = job.message["kind"], self.trials.progress(job.label, job.name)
        if job.alone:
            speed = self.trials.speed(job.label, int(job.name.rpartition(" ")[2]), self.speed_steps)
            return f"{speed['seconds']:.2f} s a step" if speed else "measured"
        if kind == "train":
            until = job.message["until"] or self.settled.steps
            if out := job.message.get("out"):
                return f"trained again in {out}, for the weights of the tested run are gone"
            loss = progress.losses.get(until)
            return f"{until} of {self.settled.steps} steps" + ("" if loss is None else f", held-out loss {loss:.4f}")
        if kind == "evaluate":
            return f"{self.settled.metric} {100 * (progress.quality or 0):.1f} % on the validation rows"
        said = {"tasks": "tasks done", "rewind": "measured on the validation rows and neutral text"}
        return said.get(kind, "measured on the test rows")

    def _base_recipe(self) -> Path:
        reference = self.candidates[0]
        return self.trials.write(
            Candidate(BASE, reference.method, reference.fields), BASE, {}, self.trials.test(BASE, BASE)
        )

    def _speed_recipe(self, candidate: Candidate, number: int) -> Path:
        rate = self.settled.priors[candidate.label]
        no_rows = {"data.eval": None, "data.eval_fraction": 0.0, "evaluation.metrics": None}
        changes = {**no_rows, "optimizer.learning_rate": rate}
        return self.trials.write(candidate, f"speed-{number}", changes, self._speed_run(candidate.label, number))

    def _speed_run(self, label: str, number: int | str) -> Path:
        return self.trials.root / "speed" / f"{label}-{number}"

    def _train_job(self, label: str, name: str, recipe: Path, until: int) -> Job:
        whole = until >= self.settled.steps
        pauses = [step for step in paused_steps(self.settled.steps) if step < until] if "seed-" not in name else []
        message = {"kind": "train", "recipe": str(recipe), "until": None if whole else until, "pauses": pauses}
        return Job(label, name, message)

    def _test_job(self, label: str, name: str, what: Mapping[str, Any]) -> Job:
        out = self.trials.test(label, name)
        return Job(label, name, {"kind": "test", "test": self.settled.test, "out": str(out), **what})

    def _task_jobs(self, label: str, name: str, what: Mapping[str, Any]) -> list[Job]:
        tasks = self.loaded.study.tasks
        done = not tasks or self.trials.task_scores(label, name, tasks) is not None
        # The base comes first: what was measured of other items than its own does not count.
        waits = label != BASE and self.trials.task_scores(BASE, BASE, tasks) is None
        if done or waits or any(self.trials.progress(one, "tasks").failed for one in (BASE, label)):
            return []
        return [Job(label, name, {"kind": "tasks", "tasks": tasks, "out": str(self.trials.test(label, name)), **what})]
