"""A study's jobs on a Ray cluster, which is played by a module of a few lines; test_compare.py has the real one."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from test_compare import make_study

from ftune import cli
from ftune.errors import FtuneError
from ftune.experiments import compare as compare_module
from ftune.experiments import ray_pool
from ftune.experiments.drift import Environment
from ftune.experiments.pool import Job
from ftune.experiments.ray_pool import RayPool
from ftune.experiments.study import load_study


class RayError(Exception):
    """What a task raises whose node is lost."""


@dataclass(eq=False)
class Reference:
    """A task that was begun."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Ray(types.ModuleType):
    """A cluster whose tasks are done when they are waited for.

    Attributes:
        has: Its devices.
        needs: What each kind of task was given.
        most: Tasks at once.
        cancelled: Those that were cancelled.
        waited: Those that had ended when the driver went on.
        shut: Whether it was left.
    """

    def __init__(self, **has: float) -> None:
        super().__init__("ray")
        self.__spec__ = importlib.machinery.ModuleSpec("ray", None)
        self.has, self.shut, self.most = has, False, 0
        self.needs: list[dict[str, float]] = []
        self.cancelled: list[Reference] = []
        self.waited: list[Reference] = []
        self._open: list[Reference] = []

    def init(self, **_: Any) -> None:
        pass

    def shutdown(self) -> None:
        self.shut = True

    def cluster_resources(self) -> dict[str, float]:
        return self.has

    def remote(self, **needs: float) -> Callable[[Callable[..., Any]], Any]:
        self.needs.append(needs)

        def task(function: Callable[..., Any]) -> Any:
            def call(*arguments: Any) -> Any:
                self._open.append(Reference(function, arguments))
                self.most = max(self.most, len(self._open))
                return self._open[-1]

            return types.SimpleNamespace(remote=call)

        return task

    def wait(self, references: list[Reference], num_returns: int = 1) -> tuple[list[Reference], list[Reference]]:
        self.waited += references[:num_returns]
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Reference) -> Any:
        self._open.remove(reference)
        return reference.function(*reference.arguments)

    def cancel(self, reference: Reference) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    stub, errors = Ray(CPU=2.0), types.ModuleType("ray.exceptions")
    errors.RayError = RayError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setitem(sys.modules, "ray.exceptions", errors)
    return stub


def to_do(*names: str) -> tuple[dict[str, Any], Callable[[], list[Job]], Callable[[Job, Mapping[str, Any]], None]]:
    """Jobs that wait until they have a result: the results, and both arguments of ``do``."""
    results: dict[str, Any] = {}

    def done(job: Job, result: Mapping[str, Any]) -> None:
        results[job.name] = result

    return results, lambda: [Job("a", name, {"name": name}) for name in names if name not in results], done


def test_each_job_is_done_once_on_a_device_of_its_own(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.has = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr(ray_pool, "_do", lambda message, *_: {"of": message["name"]})
    results, jobs, done = to_do("1", "2", "3")
    with RayPool(tmp_path / "log") as pool:
        pool.do(jobs, done)
    assert results == {name: {"of": name} for name in ("1", "2", "3")}
    assert ray.needs == [{"num_gpus": 1}]
    assert ray.most == 2
    assert ray.shut


def test_what_is_interrupted_is_done_again_and_what_ray_loses_has_failed(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [{"interrupted": True}, {"seconds": 1.0}, RayError("the node died")]

    def do(*_: Any) -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, RayError):
            raise answer
        return answer

    ray.has = {"CPU": 1.0}
    monkeypatch.setattr(ray_pool, "_do", do)
    results, jobs, done = to_do("1", "2")
    with RayPool(tmp_path / "log") as pool:
        pool.do(jobs, done)
    assert results == {"1": {"seconds": 1.0}, "2": {"failed": "Ray lost the process: the node died"}}
    assert ray.needs == [{"num_cpus": 1}]


def test_a_study_waits_while_the_cluster_has_no_device(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, told = [], []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            ray.has = {"CPU": 4.0, "GPU": 1.0}

    monkeypatch.setattr(ray_pool.time, "sleep", sleep)
    monkeypatch.setattr(ray_pool, "_do", lambda *_: {"seconds": 1.0})
    ray.has = {"CPU": 4.0, "GPU": 1.0}
    results, jobs, done = to_do("1")
    with RayPool(tmp_path / "log", told.append) as pool:
        ray.has = {"CPU": 4.0}  # its GPUs are gone: what was begun on them does not go on on CPUs
        pool.do(jobs, done)
    assert list(results) == ["1"]
    assert len(looks) == 3
    assert told == ["the Ray cluster has no GPU now: the study waits for one"]
    assert ray.needs == [{"num_gpus": 1}]


def test_a_cluster_without_devices_is_refused(ray: Ray, tmp_path: Path) -> None:
    ray.has = {"memory": 1e9}
    with pytest.raises(FtuneError, match="no GPU and no CPU"), RayPool(tmp_path / "log"):
        pytest.fail("it was entered")
    assert ray.shut


def test_what_is_at_work_is_cancelled_and_waited_for(ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "_do", lambda *_: {"seconds": 1.0})

    def stop(job: Job, result: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    _, jobs, _ = to_do("1", "2")
    with pytest.raises(KeyboardInterrupt), RayPool(tmp_path / "log") as pool:
        pool.do(jobs, stop)
    assert [reference.arguments[0] for reference in ray.cancelled] == [{"name": "2"}]
    assert ray.waited[-1] is ray.cancelled[0]


def in_place_of_a_worker(where: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = where / "worker.sh"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_job_is_a_process_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_a_worker(tmp_path, monkeypatch, "echo warned >&2\nexec cat")
    log = tmp_path / "log"
    assert ray_pool._do({"seconds": 1.0}, str(log), str(tmp_path)) == {"seconds": 1.0}
    assert log.read_text() == "warned\n"
    in_place_of_a_worker(tmp_path, monkeypatch, "exit 3")
    assert ray_pool._do({}, str(log), "/no such")["failed"] == f"the process ended with exit code 3: see {log}"


def test_a_job_that_ray_cancels_saves_its_step_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "saved"
    script = f"trap 'sleep 1; touch {saved}; exit' TERM\necho begun\nwhile :; do sleep 0.1; done"
    in_place_of_a_worker(tmp_path, monkeypatch, script)

    def cancelled(worker: subprocess.Popen[str], line: str) -> str:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_pool, "_answer", cancelled)
    with pytest.raises(KeyboardInterrupt):
        ray_pool._do({}, str(tmp_path / "log"), str(tmp_path))
    assert saved.exists()


def test_a_long_job_is_looked_at_again_and_again() -> None:
    given = []

    def communicate(line: str | None, timeout: float) -> tuple[str, None]:
        given.append(line)
        if len(given) < 3:
            raise subprocess.TimeoutExpired("worker", timeout)
        return "{}\n", None

    worker: Any = types.SimpleNamespace(communicate=communicate)
    assert ray_pool._answer(worker, "a job\n") == "{}\n"
    assert given == ["a job\n", None, None]


def test_a_study_keeps_what_the_nodes_compute_with(ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = replace(Environment.here(), device="a GPU of the cluster")
    monkeypatch.setattr(ray_pool, "_environment", lambda: node)
    kept = []

    def require_agreement(made: Any, pool: Any, now: Environment, tell: Any) -> None:
        kept.append(now)
        raise FtuneError("enough")

    monkeypatch.setattr(compare_module.Worklist, "require_agreement", require_agreement)
    with pytest.raises(FtuneError, match="enough"):
        compare_module.compare(load_study(make_study(tmp_path, methods=["lora"])), ray=True)
    assert kept == [node]
    assert ray.needs == [{"num_cpus": 1, "max_calls": 1}]


def test_nodes_without_ftune_are_told_before_anything_is_trained(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Environment:
        raise RayError("No module named 'ftune'")

    monkeypatch.setattr(ray_pool, "_environment", fail)
    with RayPool(tmp_path / "log") as pool, pytest.raises(FtuneError, match="cannot run ftune: No module"):
        pool.environment()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "fsdp2"], "--engine fsdp2: no engine of a study"),
        (["--engine", "ray", "--devices", "0"], "--engine ray and --devices do not go together"),
    ],
)
def test_an_engine_that_a_study_does_not_have_is_refused(
    flags: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["ftune", "compare", str(make_study(tmp_path)), *flags])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
