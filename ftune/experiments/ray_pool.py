"""A study's jobs on a Ray cluster: Ray places each on a free device, and starts it again when a node is lost.

The study's directory is on storage that every node sees: a job reads and writes there alone, and goes on from what is
there, so that one that is started again makes no step twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftune.artifacts.ray_engine import require_ray
from ftune.experiments.pool import Job, same

__all__ = ["RayPool"]


class RayPool:
    """Workers wherever the cluster of ``RAY_ADDRESS``, or Ray on this machine, has a GPU; or a CPU, where it has none.

    Args:
        log: Where the workers' standard error goes.

    Raises:
        FtuneError: Ray is not installed.
    """

    def __init__(self, log: Path) -> None:
        require_ray()
        self._log = log.absolute()

    def __enter__(self) -> Self:
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def do(self, next_jobs: Callable[[], list[Job]], done: Callable[[Job, Mapping[str, Any]], None]) -> None:
        """Do jobs until there are none, as ``Pool.do`` does; a job is a process of its own."""
        import ray
        from ray.exceptions import RayError

        kind = "GPU" if ray.cluster_resources().get("GPU", 0) else "CPU"
        needs = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
        remote = ray.remote(**needs)(_do)
        busy: dict[Any, Job] = {}
        try:
            while True:
                free = int(ray.cluster_resources().get(kind, 0)) - len(busy)
                waiting = [job for job in next_jobs() if not any(same(job, other) for other in busy.values())]
                for job in waiting[: max(0, free)]:
                    busy[remote.remote(dict(job.message), str(self._log), str(Path.cwd()))] = job
                if not busy:
                    return
                (ready, *_), _ = ray.wait(list(busy))
                try:
                    result = ray.get(ready)
                except RayError as error:
                    result = {"failed": f"Ray lost the process: {error}"}
                job = busy.pop(ready)
                if not result.get("interrupted"):  # its node is going: what it began is saved, and goes on elsewhere
                    done(job, result)
        finally:
            for reference in busy:
                with contextlib.suppress(Exception):
                    ray.cancel(reference)


def _do(message: Mapping[str, Any], log: str, directory: str) -> dict[str, Any]:
    """Do one job on the node where this is called; what it begins ends with it."""
    with open(log, "a") as errors:
        worker = subprocess.run(
            [sys.executable, "-m", "ftune.experiments.worker"],
            input=json.dumps(message) + "\n",
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=directory if os.path.isdir(directory) else None,
            check=False,
        )
    if worker.stdout:
        found: dict[str, Any] = json.loads(worker.stdout)
        return found
    return {"failed": f"the process ended with exit code {worker.returncode}: see {log}"}
