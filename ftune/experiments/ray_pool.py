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
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftune.artifacts.ray_engine import require_ray
from ftune.errors import FtuneError
from ftune.experiments.drift import Environment
from ftune.experiments.pool import Job, ended, same

__all__ = ["RayPool"]

ASK_AGAIN_SECONDS = 5
"""Between two looks for a device, while the cluster has none."""


class RayPool:
    """Workers wherever the cluster of ``RAY_ADDRESS``, or Ray on this machine, has a GPU; or a CPU, where it has none.

    Args:
        log: Where the workers' standard error goes.
        tell: Called with a line when the cluster has no device.

    Raises:
        FtuneError: Ray is not installed; on entering: the cluster has no device.
    """

    def __init__(self, log: Path, tell: Callable[[str], None] = lambda line: None) -> None:
        require_ray()
        self._log = log.absolute()
        self._tell = tell
        self._kind = "GPU"

    def __enter__(self) -> Self:
        import ray

        ray.init(ignore_reinit_error=True, log_to_driver=False)
        if not self._devices():
            self._kind = "CPU"
        if not self._devices():
            ray.shutdown()
            raise FtuneError("the Ray cluster has no GPU and no CPU", help="add a node; `ray status` lists what it has")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def environment(self) -> Environment:
        """What one of the cluster's devices computes with.

        Raises:
            FtuneError: ftune does not run there.
        """
        import ray
        from ray.exceptions import RayError

        # In a process that ends with it, or what it imported would take memory from the runs.
        remote = ray.remote(max_calls=1, **self._needs())(_environment)
        try:
            found: Environment = ray.get(remote.remote())
        except RayError as error:
            raise FtuneError(
                f"a node of the Ray cluster cannot run ftune: {error}", help="install the same versions on every node"
            ) from error
        return found

    def do(self, next_jobs: Callable[[], list[Job]], done: Callable[[Job, Mapping[str, Any]], None]) -> None:
        """Do jobs until there are none, as ``Pool.do`` does; a job is a process of its own.

        While the cluster has no device, it waits for one.
        """
        import ray
        from ray.exceptions import RayError

        remote = ray.remote(**self._needs())(_do)
        busy: dict[Any, Job] = {}
        told = False
        try:
            while True:
                waiting = [job for job in next_jobs() if not any(same(job, other) for other in busy.values())]
                for job in waiting[: max(0, self._devices() - len(busy))]:
                    busy[remote.remote(dict(job.message), str(self._log), str(Path.cwd()))] = job
                if not busy:
                    if not waiting:
                        return
                    if not told:
                        self._tell(f"the Ray cluster has no {self._kind} now: the study waits for one")
                    told = True
                    time.sleep(ASK_AGAIN_SECONDS)
                    continue
                (ready, *_), _ = ray.wait(list(busy))
                try:
                    result = ray.get(ready)
                except RayError as error:
                    result = {"failed": f"Ray lost the process: {error}"}
                job = busy.pop(ready)
                if not result.get("interrupted"):  # its node is going: what it began is saved, and goes on elsewhere
                    done(job, result)
        finally:
            with contextlib.suppress(Exception):
                for reference in busy:
                    ray.cancel(reference)
                if busy:  # Ray kills what is at work when it is left: wait until each has saved its step
                    ray.wait(list(busy), num_returns=len(busy))

    def _devices(self) -> int:
        """How many there are in the cluster, free or not."""
        import ray

        return int(ray.cluster_resources().get(self._kind, 0))

    def _needs(self) -> dict[str, int]:
        """What a job is given."""
        return {f"num_{self._kind.lower()}s": 1}


def _environment() -> Environment:
    return Environment.here()


def _do(message: Mapping[str, Any], log: str, directory: str) -> dict[str, Any]:
    """Do one job on the node where this is called; what it begins ends with it, and saves its step first."""
    with (
        open(log, "a") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "ftune.experiments.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=directory if os.path.isdir(directory) else None,
            start_new_session=True,  # Ctrl-C comes to the driver, and is handed on
        ) as worker,
    ):
        try:
            answer = _answer(worker, json.dumps(message) + "\n")
        except BaseException:  # as when Ray cancels this
            worker.terminate()
            worker.wait()
            raise
    if answer:
        found: dict[str, Any] = json.loads(answer)
        return found
    return {"failed": f"the process {ended(worker.returncode)}: see {log}"}


def _answer(worker: subprocess.Popen[str], line: str) -> str:
    """What a worker says of one job, once it has ended."""
    given: str | None = line
    while True:
        try:
            return worker.communicate(given, timeout=1)[0]
        except subprocess.TimeoutExpired:  # Ray cancels between two instructions of Python, not in a long wait
            given = None
