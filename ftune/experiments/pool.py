"""Processes that do a study's jobs: one for each device, each one job at a time."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ftune.errors import Interrupted

__all__ = ["Job", "Pool", "ended", "same"]


@dataclass(frozen=True)
class Job:
    """One thing to do.

    Attributes:
        label: Of which method.
        name: Of which of its runs.
        message: What the worker is told (``ftune.experiments.worker``).
        alone: Whether it needs a process of its own: the peak of its memory is measured, and what an earlier job left
            (on a CPU, places in the heap that are free and still resident) would count to it.
    """

    label: str
    name: str
    message: Mapping[str, Any]
    alone: bool = False


class Pool:
    """Workers on devices, from their first job until the pool is left: a context manager.

    Args:
        devices: Numbers of GPUs; empty: one worker on whatever there is.
        log: Where the workers' standard error goes.
        lock: The study's open lock, which the workers hold too: after a kill, until they have saved their step.
        fork: Whether jobs that must be alone are done in children of one worker, which saves the imports; False: each
            in a process that is started for it. A child cannot use CUDA that its parent has looked for.
    """

    def __init__(self, devices: Sequence[int], log: Path, *, lock: int | None = None, fork: bool = False) -> None:
        self._devices: list[int | None] = list(devices) or [None]
        self._log = log
        self._inherited = () if lock is None else (lock,)
        self._fork = fork
        self._workers: dict[int | None, subprocess.Popen[str]] = {}
        self._used: set[int | None] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop(at_work=False)

    def do(self, next_jobs: Callable[[], list[Job]], done: Callable[[Job, Mapping[str, Any]], None]) -> None:
        """Do jobs until there are none.

        Args:
            next_jobs: What can be done now, by what the disk holds; asked again after every job.
            done: Called with each job and what became of it.

        Raises:
            Interrupted: A worker was asked to stop, or this process was; what was begun is saved.
        """
        busy: dict[int | None, Job] = {}
        try:
            while True:
                waiting = [job for job in next_jobs() if not any(same(job, other) for other in busy.values())]
                for device in self._devices:
                    if device not in busy and waiting:
                        job = waiting.pop(0)
                        self._send(device, job)
                        busy[device] = job
                if not busy:
                    return
                device, result = self._receive(busy)
                if result.get("interrupted"):
                    raise Interrupted(
                        "the study was stopped", signal_number=signal.SIGINT, help="the same command goes on with it"
                    )
                done(busy.pop(device), result)
        except BaseException:
            self._stop(at_work=bool(busy))
            raise

    def _send(self, device: int | None, job: Job) -> None:
        worker = self._workers.get(device)
        if job.alone and device in self._used:
            self._end(device)
            worker = None
        if worker is None:
            worker = self._workers[device] = self._start(device)
        child = job.alone and self._fork
        if not child:
            self._used.add(device)
        assert worker.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it was idle; the next look finds it so
            worker.stdin.write(json.dumps({**job.message, "child": child}) + "\n")
            worker.stdin.flush()

    def _start(self, device: int | None) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with self._log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ftune.experiments.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                pass_fds=self._inherited,
                start_new_session=True,  # Ctrl-C comes here, and is handed on
            )

    def _receive(self, busy: Mapping[int | None, Job]) -> tuple[int | None, dict[str, Any]]:
        """Wait for a worker's result; one that died has failed."""
        with selectors.DefaultSelector() as selector:
            for device in busy:
                out = self._workers[device].stdout
                assert out is not None
                selector.register(out, selectors.EVENT_READ, device)
            (key, _), *_ = selector.select()
        device = key.data
        worker = self._workers[device]
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if line:
            return device, json.loads(line)
        code = worker.wait()
        del self._workers[device]
        self._used.discard(device)
        return device, {"failed": f"the process {ended(code)}: see {self._log}"}

    def _end(self, device: int | None) -> None:
        worker = self._workers.pop(device)
        self._used.discard(device)
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.close()
        worker.wait()
        worker.stdout.close()

    def _stop(self, at_work: bool) -> None:
        """End all workers; those at work finish their step, and save it."""
        for worker in self._workers.values():
            if at_work:
                worker.terminate()
        for device in list(self._workers):
            self._end(device)


def same(one: Job, other: Job) -> bool:
    """Whether both are of one run, which one process at a time may change."""
    return (one.label, one.name) == (other.label, other.name)


def ended(code: int) -> str:
    """How a process ended, by the exit code that ``subprocess`` gives it."""
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
