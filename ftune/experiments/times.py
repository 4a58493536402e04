"""How long a study's jobs took, and the study: ``STUDY/times.jsonl``, a line for each job."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftune.experiments.pool import Job
from ftune.human import now_text

__all__ = ["Clock", "times"]


class Clock:
    """Writes down the jobs of one session, from its beginning.

    Args:
        root: The study's directory.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "times.jsonl"
        self._session = now_text()
        self._began = time.monotonic()

    def keep(self, job: Job, result: Mapping[str, Any]) -> None:
        """Write down a job that ended, and the session's time up to now."""
        line = {
            "session": self._session,
            "elapsed": round(time.monotonic() - self._began, 2),
            "label": job.label,
            "name": job.name,
            "kind": job.message["kind"],
            "alone": job.alone,
            **{what: round(result.get(what, 0.0), 3) for what in ("seconds", "training", "answering")},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def times(root: Path) -> dict[str, float]:
    """Seconds that a study has taken.

    Returns:
        ``training`` and ``answering``: of all jobs, steps and held-out rows. ``study``: of all sessions, up to the end
        of each one's last job. ``job``: what a job takes besides its steps, the median of those made to measure it.
    """
    path = root / "times.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a torn line
            lines.append(json.loads(line))
    besides = [line["seconds"] - line["training"] for line in lines if line["alone"] and line["training"]]
    return {
        "training": round(sum(line["training"] for line in lines), 1),
        "answering": round(sum(line["answering"] for line in lines), 1),
        "study": round(sum({line["session"]: line["elapsed"] for line in lines}.values()), 1),
        "job": statistics.median(besides) if besides else 0.0,
    }
