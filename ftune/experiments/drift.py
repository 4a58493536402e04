"""Whether a study may go on here and now: what it was computed with, and its anchor computed again.

The same configuration can score otherwise with other versions of a library or on another processor, by more than the
methods differ. So a study keeps in ``STUDY/environments.json`` what it was computed with. Where it goes on with
something else, or more than a day after the last look, its *anchor* is computed again first: the model before training
on the test rows, and the first steps of a trial of LoRA. What does not agree is not mixed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ftune.artifacts.run_dir import package_versions
from ftune.errors import RunDirError
from ftune.experiments.pool import Job
from ftune.experiments.settle import Settled
from ftune.experiments.study import BASE, REFERENCE
from ftune.experiments.trials import Trials
from ftune.experiments.tuning import WIDENED, grid
from ftune.human import now_text
from ftune.plan.precision import CAPS, processor
from ftune.run.files import write_json
from ftune.run.sinks.jsonl import read_events

__all__ = ["Anchor", "Environment", "environments", "keep_environments", "refusal"]

ANCHOR_ROWS = 200
"""Test rows that are answered again; the loss is of all of them."""
ANCHOR_STEPS = 3
"""Steps of LoRA that are made again."""
ROWS_APART = 0.02
"""Share of the answered rows, one row at least, by which the sum of their scores may differ."""
LOSS_APART, LOSS_APART_16_BITS = {"float32": 1e-4}, 2e-3
"""How far two losses may be apart, as a share. Eight layers of 256 on AVX-512 and on AVX2, after three steps: 1.5e-6 in
float32 at a rate of 1e-2, and the same answers; 1.3e-4 in bfloat16. In bfloat16 where it was float32: 6e-4."""
FRESH = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Environment:
    """What a study is computed with.

    Attributes:
        device: The GPU; or the processor, what libraries may use of it, and threads.
        processor: A digest of the processor's instructions, which its name does not tell.
        versions: Of Python, ftune and the libraries.
        since: When it was first seen, in UTC.
        checked: When it was last seen to agree with what the study was begun with.
    """

    device: str
    processor: str
    versions: dict[str, str]
    since: str
    checked: str

    @classmethod
    def here(cls, devices: Sequence[int] = ()) -> Environment:
        """What there is now; devices: numbers of the GPUs that are used."""
        import torch

        if torch.cuda.is_available():
            names = {torch.cuda.get_device_name(number) for number in devices or [torch.cuda.current_device()]}
            device = ", ".join(sorted(names))
        else:
            named = [line.split(":")[1].strip() for line in processor().splitlines() if line.startswith("model name")]
            caps = [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
            used = [torch.backends.cpu.get_cpu_capability(), *caps, f"threads: {torch.get_num_threads()}"]
            device = f"{(*named, platform.processor(), platform.machine())[0]} ({', '.join(used)})"
        digest = hashlib.sha256(processor().encode()).hexdigest()[:16]
        now = now_text()
        return cls(device, digest, package_versions(), now, now)

    def equals(self, other: Environment) -> bool:
        """Whether processor and versions are the same."""
        return self == replace(other, since=self.since, checked=self.checked)

    def holds(self, now: Environment) -> bool:
        """Whether a study that was computed with this goes on without a look."""
        then, today = (datetime.datetime.fromisoformat(one.checked) for one in (self, now))
        return self.equals(now) and today - then < FRESH

    def told_beside(self, now: Environment) -> str:
        """How another environment differs from this one."""
        names = sorted(self.versions.keys() | now.versions.keys())
        pairs = [("device", self.device, now.device), ("processor", self.processor, now.processor)]
        pairs += [(name, self.versions.get(name, "none"), now.versions.get(name, "none")) for name in names]
        return ", ".join(f"{name} {a} then, {b} now" for name, a, b in pairs if a != b) or f"since {self.checked}"


def environments(root: Path) -> list[Environment]:
    """What a study was computed with, in order."""
    path = root / "environments.json"
    return [Environment(**one) for one in json.loads(path.read_text(encoding="utf-8"))] if path.is_file() else []


def keep_environments(root: Path, found: Sequence[Environment]) -> None:
    """Keep what a study was computed with."""
    write_json(root / "environments.json", [asdict(one) for one in found])


@dataclass(frozen=True)
class Anchor:
    """What is computed again before a study goes on.

    Attributes:
        trials: The study's runs.
        settled: What it began with.
    """

    trials: Trials
    settled: Settled

    @property
    def root(self) -> Path:
        """Where it is computed."""
        return self.trials.root / "anchor"

    def jobs(self) -> list[Job]:
        """What is still to be computed; empty where nothing was kept to compare with."""
        jobs = []
        base = self.trials.recipe(BASE, BASE)
        if self.trials.tested(BASE, BASE) and not (self.root / BASE / "eval.json").is_file():
            asked = {"kind": "test", "run": None, "recipe": str(base), "forgetting": False, "rows": ANCHOR_ROWS}
            jobs.append(Job(BASE, "anchor", {**asked, "test": self.settled.test, "out": str(self.root / BASE)}))
        trial = self._trial()
        if trial is not None and not (self.root / REFERENCE / "run.json").is_file():
            until = min(ANCHOR_STEPS, self.settled.steps)
            recipe = self.trials.recipe(REFERENCE, trial)
            message = {"kind": "train", "recipe": str(recipe), "until": until, "out": str(self.root / REFERENCE)}
            jobs.append(Job(REFERENCE, "anchor", message))
        return jobs

    def differences(self) -> list[str]:
        """What does not agree with what was kept, a line each."""
        return [*self._of_base(), *self._of_lora()]

    def _of_base(self) -> Iterator[str]:
        found = self.root / BASE
        if not (found / "eval.json").is_file():
            return
        now = json.loads((found / "eval.json").read_text(encoding="utf-8"))["base"]["loss"]
        yield from self._losses("the base's loss on the test rows", self.trials.result(BASE, BASE)["loss"], now)
        scores = self.trials.scores_in(found, "base")
        before = self.trials.scores(BASE, BASE)
        rows = [row for row in scores if row in before]
        old, new = (sum(one[row] for row in rows) for one in (before, scores))
        allowed = max(1.0, ROWS_APART * len(rows))
        if abs(new - old) > allowed + 1e-9:
            yield (
                f"the base's {self.settled.metric} on {len(rows)} test rows: {100 * old / len(rows):.1f} % then, "
                f"{100 * new / len(rows):.1f} % now (allowed: {allowed:.0f} rows)"
            )

    def _of_lora(self) -> Iterator[str]:
        trial = self._trial()
        if trial is None:
            return
        before, now = _losses(self.trials.run(REFERENCE, trial)), _losses(self.root / REFERENCE)
        for step in sorted(before.keys() & now.keys()):
            yield from self._losses(f"LoRA's loss at step {step} ({trial})", before[step], now[step])

    def _losses(self, what: str, then: float, now: float) -> Iterator[str]:
        allowed = LOSS_APART.get(self.settled.common["model.dtype"], LOSS_APART_16_BITS)
        apart = abs(now - then) / abs(then) if then else abs(now)
        if not apart <= allowed:
            yield f"{what}: {then:.5f} then, {now:.5f} now ({100 * apart:.2f} % apart, allowed: {100 * allowed:g} %)"

    def _trial(self) -> str | None:
        """The trial of LoRA with the lowest rate that has made a step: it carries rounding on the least."""
        protocol = self.settled.asked
        prior = self.settled.priors[REFERENCE]
        for setting in grid(prior, protocol["trials"], protocol["search"], wider=WIDENED):
            if _losses(self.trials.run(REFERENCE, setting.name)):
                return setting.name
        return None


def _losses(run: Path) -> dict[int, float]:
    """The training loss of each step of a run."""
    events: list[dict[str, Any]] = read_events(run / "metrics.jsonl")
    steps = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    return {step: math.nan if loss is None else loss for step, loss in steps.items()}


def refusal(root: Path, then: Environment | None, now: Environment, differences: Sequence[str]) -> RunDirError:
    """Why a study does not go on here."""
    what = then.told_beside(now) if then is not None else "what it was begun with is not known"
    head = f"{root} does not go on here: its anchor, computed again, does not agree ({what}):"
    return RunDirError(
        "\n  ".join([head, *differences]),
        help="begin another study with another output_dir, or go on with what this one was computed with",
    )
