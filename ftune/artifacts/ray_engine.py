"""Train on the workers of a Ray cluster.

Ray Train places the workers, joins them, and starts all of them again when one is lost. Checkpoints stay in ftune's
run directory, on storage that every worker sees: there they are written whole, verified when read, and the same
whatever engine made them; a copy in Ray's own storage would be neither. So a worker started again resumes from there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

from ftune.artifacts.run_dir import RunDir
from ftune.errors import FtuneError, RunFailed
from ftune.recipe.load import Loaded

__all__ = ["MAX_FAILURES", "require_ray", "train_on_ray"]

MAX_FAILURES = 3
"""How often the workers are started again before the run fails."""


def require_ray() -> None:
    """Hold that Ray is installed.

    Raises:
        FtuneError: It is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise FtuneError("--engine ray needs Ray, which is not installed", help="pip install 'ftune[ray]'")


def train_on_ray(loaded: Loaded, *, num_workers: int, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train a recipe on Ray's workers; returns the record that ``run.json`` keeps.

    Connects to the cluster of ``RAY_ADDRESS`` or to one that runs on this machine; else starts one here. A worker
    has one GPU where the cluster has any, else one CPU.

    Args:
        loaded: The recipe and its text; relative paths are those of the current directory, on every node.
        num_workers: Processes in all.
        resume: Continue from the newest whole checkpoint.
        overwrite: Replace a run that the directory holds.

    Raises:
        FtuneError: Ray is missing, the machine is too small, or the run directory is taken.
        RunFailed: The workers failed more than ``MAX_FAILURES`` times.
    """
    require_ray()
    run = RunDir(Path(loaded.recipe.output_dir).expanduser().absolute())
    run.prepare(overwrite=overwrite, resume=resume)

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(ignore_reinit_error=True, log_to_driver=True)
    has = ray.cluster_resources()
    kind = "GPU" if has.get("GPU", 0) else "CPU"
    # A cluster may grow when asked; this machine does not, and Ray would wait for ever.
    if "RAY_ADDRESS" not in os.environ and has.get(kind, 0) < num_workers:
        ray.shutdown()
        raise FtuneError(
            f"--num-workers {num_workers}: there are {has.get(kind, 0):.0f} {kind}s here",
            help="fewer workers, or RAY_ADDRESS of a cluster",
        )
    name = f"ftune-{uuid.uuid4().hex[:8]}"
    state = run.root.parent / ".ray"  # beside the run, so that every node sees it
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "loaded": loaded,
            "directory": str(Path.cwd()),
            "resume": resume,
            "overwrite": overwrite,
            "before": _digest(run),
        },
        torch_config=TorchConfig(backend="nccl" if kind == "GPU" else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=kind == "GPU"),
        run_config=RunConfig(
            name=name, storage_path=str(state), failure_config=FailureConfig(max_failures=MAX_FAILURES)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise RunFailed(f"the workers failed: {error}", help="mend the cause, then continue with --resume") from error
    finally:
        shutil.rmtree(state / name, ignore_errors=True)
        if state.is_dir() and not any(state.iterdir()):
            state.rmdir()
        ray.shutdown()
    record = run.read()
    if record.get("status") != "finished":
        raise RunFailed(f"Ray reports success, but the run is {record.get('status')}", help="continue with --resume")
    return record


def _digest(run: RunDir) -> str | None:
    """What ``run.json`` holds, in short; None where there is no run."""
    return hashlib.sha256(run.record_path.read_bytes()).hexdigest() if run.exists() else None


def _started_again(run: RunDir, before: str | None) -> bool:
    """Whether this launch wrote the run that is here: then an earlier attempt of it was lost.

    Every worker asks before training begins, and the main process writes ``run.json`` only after all have joined; so
    all get one answer, and no clock is asked.
    """
    now = _digest(run)
    return now is not None and now != before


def _worker(config: dict[str, Any]) -> None:
    """What each worker does: the same training as under torchrun, whose variables Ray sets."""
    from ftune.artifacts.training import train
    from ftune.plan.table import render_plan

    if os.path.isdir(config["directory"]):
        os.chdir(config["directory"])
    loaded: Loaded = config["loaded"]
    run = RunDir(Path(loaded.recipe.output_dir).expanduser())
    again = _started_again(run, config["before"])
    if again and run.read().get("status") == "finished":
        return  # lost after its last word
    train(
        loaded,
        resume=again or config["resume"],
        overwrite=config["overwrite"] and not again,
        show_plan=lambda summary: print(render_plan(summary, 100), file=sys.stderr),
    )
