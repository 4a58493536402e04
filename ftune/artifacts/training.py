"""Run a recipe into a run directory."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.card import write_card
from ftune.artifacts.kernels import kernels_of_run
from ftune.artifacts.objective import loss_of, make_objective
from ftune.artifacts.run_dir import RunDir, package_versions
from ftune.errors import FtuneError, Interrupted, RunDirError, RunFailed
from ftune.human import bytes_text
from ftune.ops.kernels import EAGER, using
from ftune.plan.pinned import pins
from ftune.plan.resolve import Plan, build, resolve
from ftune.recipe.load import Loaded
from ftune.recipe.schema import Recipe
from ftune.run.checkpoint import Checkpoints
from ftune.run.events import EvalEnd, Event, Resumed, RunEnd, RunStart, Saved, Sink, StepEnd, Vitals
from ftune.run.files import new_directory
from ftune.run.forecast import Forecaster
from ftune.run.loop import Loop
from ftune.run.signals import StopRequest
from ftune.run.sinks.jsonl import JsonlSink, read_events, truncate_after
from ftune.run.sinks.progress import ProgressSink
from ftune.run.sinks.tracker import TrackerSink, flatten

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["train"]

_LOCAL_SINKS = ("progress", "jsonl")
# Blocks that may differ between start and resume: they do not change what is trained.
_FREE_TO_CHANGE = ("checkpoint", "evaluation", "tracking", "output_dir")


@dataclass
class _Tally:
    """A sink that adds up what ``run.json`` reports as measured."""

    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    first_loss: float | None = None
    last: StepEnd | None = None
    evals: list[EvalEnd] = field(default_factory=list)

    def receive(self, event: Event) -> None:
        if isinstance(event, StepEnd):
            self.tokens += event.tokens
            self.seconds += event.seconds
            self.peak_bytes = max(self.peak_bytes, event.peak_bytes)
            self.first_loss = event.loss if self.first_loss is None else self.first_loss
            self.last = event
        elif isinstance(event, EvalEnd):
            self.evals.append(event)

    def close(self) -> None:
        pass

    def recall(self, metrics: Path) -> None:
        """Take the steps that a resumed run made before, from its ``metrics.jsonl``."""
        names = {field.name for field in dataclasses.fields(StepEnd)} - {"extra"}
        for event in read_events(metrics):
            if event["event"] == "step":
                self.receive(StepEnd(**{name: event[name] for name in names}))

    def measured(self, predicted: int) -> dict[str, Any]:
        """Figures of this process's part of the run."""
        if self.last is None:
            return {}
        return {
            "steps": self.last.step,
            "loss": self.last.loss,
            "first_loss": self.first_loss,
            "held_out_loss": self.evals[-1].loss if self.evals else None,
            "tokens": self.tokens,
            "training_seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": predicted,
            "predicted_over_measured": predicted / self.peak_bytes if self.peak_bytes else None,
        }


def train(
    loaded: Loaded,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show_plan: Callable[[dict[str, Any]], None] = lambda summary: None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a recipe; returns the record that ``run.json`` keeps.

    Args:
        loaded: The recipe and its text.
        resume: Continue from the newest whole checkpoint of this run directory; start when there is none.
        overwrite: Replace a run that the directory holds.
        show_plan: Called with the plan before any weights are loaded.
        progress: Whether progress may be written to standard error.

    Raises:
        FtuneError: The user's mistake (exit code 2), a broken promise (1) or a signal (130, 143).
    """
    recipe, run = loaded.recipe, RunDir(Path(loaded.recipe.output_dir).expanduser())
    accelerator = _accelerator(recipe, run)
    main = accelerator.is_main_process
    if main:
        run.prepare(overwrite=overwrite, resume=resume)
    accelerator.wait_for_everyone()
    before = run.read() if resume and run.exists() else None
    plan = resolve(run.as_begun(recipe) if before else recipe, world_size=accelerator.num_processes)
    summary = plan.summary()
    if before is not None:
        _require_same(before, plan, summary, run)
        if before.get("status") == "finished":
            raise RunDirError(f"{run.root} is already finished", help="--overwrite trains it again")
    if main:
        show_plan(summary)

    record: dict[str, Any] = {
        "recipe": loaded.text,
        "overrides": list(loaded.overrides),
        "pinned": before["pinned"] if before and "pinned" in before else pins(recipe, plan.recipe),
        "resolved": plan.recipe.model_dump(mode="json"),
        "plan": summary,
        "measured": {},
        "vitals": {},
        "vitals_line": "",
        "versions": package_versions(),
        "device": summary["device"] | {"processes": accelerator.num_processes},
        "seed": recipe.training.seed,
        "status": "running",
        "started": _now(),
    }
    sinks: list[Sink] = []
    tally, forecaster = _Tally(), Forecaster.of(plan)
    began = time.perf_counter()
    status = "failed"
    try:
        with StopRequest() as stop:
            model, optimizer = build(plan)
            loss = loss_of(before) if before is not None else None
            objective, record["lean"] = make_objective(model, plan, accelerator, loss)
            record["optimizer"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint.keep)
            if main:
                _rehearse(plan, model, run)
                if overwrite:
                    # Only now: a recipe that cannot run must not cost the run it would have replaced.
                    run.clear()
            start, notes, found, kept = _restore(checkpoints, plan, model, optimizer, resume)
            kernels, lines = EAGER, list[str]()
            if recipe.training.compile:
                kernels, lines = kernels_of_run(objective, plan, accelerator, start, lean=record["lean"], progress=kept)
            if main:
                truncate_after(run.metrics, start)
                tally.recall(run.metrics)
                run.write(record)
                sinks = _sinks(plan.recipe, run, accelerator, progress)
            sinks.append(tally)

            def emit(event: Event) -> None:
                for sink in sinks:
                    sink.receive(event)
                if forecast := forecaster.after(event):
                    emit(forecast)

            if loss is not None and loss != record["lean"]["loss"]:
                notes.append("the run began with Liger's loss, which is not here: ftune's own differs by rounding")
            for line in [*(f"warning: {note}" for note in notes), *(lines if main else ())]:
                print(line, file=sys.stderr)
            emit(RunStart(start, plan.total_steps))
            if found is not None:
                emit(Resumed(start, found.name))
            loop = Loop(plan, accelerator, objective, optimizer, checkpoints, emit, stop, kept)
            with using(kernels):
                loop.run(start)
            record["vitals"] = recipe.method.vitals(model, optimizer)
            record["vitals_line"] = recipe.method.vitals_line(record["vitals"])
            emit(Vitals(plan.total_steps, record["vitals"]))
            _require_at_work(recipe, record["vitals"])
            if main:
                with new_directory(run.root / recipe.method.artifact) as out:
                    _save_artifact(plan, model, out)
                    record["measured"] = tally.measured(plan.memory.total)
                    record["measured"] |= {
                        "wall_seconds": time.perf_counter() - began,
                        "loop_seconds": forecaster.spent,
                        "predicted_loop_seconds": forecaster.predicted,
                    }
                    write_card(out, record)
                emit(Saved(plan.total_steps, recipe.method.artifact))
            status = "finished"
    except Interrupted as interrupted:
        status = "interrupted"
        overrides = "".join(f" --set {shlex.quote(override)}" for override in loaded.overrides)
        interrupted.help = f"continue with `ftune train {shlex.quote(str(loaded.path))}{overrides} --resume`"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except OSError as error:
        record["error"] = str(error)
        raise RunFailed(
            f"writing the run failed: {error}", help="free the disk, then continue with --resume"
        ) from error
    except BaseException as error:
        record["error"] = str(error)
        raise
    finally:
        if sinks and main and run.exists():  # a run that never began leaves the record of another as it is
            last = tally.last.step if tally.last else 0
            record |= {"status": status, "ended": _now()}
            record["measured"] = record["measured"] or tally.measured(plan.memory.total)
            for sink in sinks:
                sink.receive(RunEnd(last, status))
                sink.close()
            run.write(record)
    accelerator.wait_for_everyone()
    return record


def _accelerator(recipe: Recipe, run: RunDir) -> Accelerator:
    """Make the Accelerator, and hold that it sees the processes that were launched."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    trackers = [name for name in recipe.tracking if name not in _LOCAL_SINKS]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Without the flag, processes launched by torchrun on a machine without accelerators stay alone.
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        log_with=trackers or None,
        project_dir=str(run.root / "tracking") if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=30))],
    )
    if accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise FtuneError(
            f"the launch configuration asks for {accelerator.distributed_type.value}, which ftune does not run yet",
            help="launch with torchrun, or with one of configs/*.yaml",
        )
    if accelerator.num_processes != world:
        raise RunFailed(f"{world} processes were launched, but accelerate joined {accelerator.num_processes}")
    if world > 1:
        atexit.register(_leave_processes)
    return accelerator


def _leave_processes() -> None:
    """End the process group before the interpreter does: gloo's threads, still running then, abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _sinks(recipe: Recipe, run: RunDir, accelerator: Accelerator, progress: bool) -> list[Sink]:
    sinks: list[Sink] = []
    if "jsonl" in recipe.tracking:
        sinks.append(JsonlSink(run.metrics))
    if progress and "progress" in recipe.tracking:
        sinks.append(ProgressSink(sys.stderr, live=sys.stderr.isatty()))
    if any(name not in _LOCAL_SINKS for name in recipe.tracking):
        sinks.append(TrackerSink(accelerator, run.root.name, flatten(recipe.model_dump(mode="json"))))
    return sinks


def _require_at_work(recipe: Recipe, vitals: dict[str, float]) -> None:
    """Hold that the method did what it says.

    Raises:
        RunFailed: The vitals show that it did nothing.
    """
    reason = recipe.method.not_at_work(vitals)
    if reason is not None:
        raise RunFailed(
            f"`{recipe.method.name}` was not at work: {reason}",
            help="only the checkpoints were kept; run.json has the vitals",
        )


def _save_artifact(plan: Plan, model: nn.Module, out: Path) -> None:
    plan.recipe.method.save(model, out, plan.context)
    plan.tokenizer.save_pretrained(str(out))


def _rehearse(plan: Plan, model: nn.Module, run: RunDir) -> None:
    """Save once before the first step, so that a run does not fail at its end.

    Raises:
        RunFailed: What is trained cannot be saved, or the disk is too small for the checkpoints.
    """
    try:
        with tempfile.TemporaryDirectory(dir=run.root, prefix=".tmp-rehearsal-") as scratch:
            _save_artifact(plan, model, Path(scratch))
    except Exception as error:
        raise RunFailed(f"the result of this run could not be saved: {error}") from error
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one = trained + plan.recipe.method.optimizer_bytes(plan.shape, plan.recipe.optimizer.name)
    needed = one * (plan.recipe.checkpoint.keep + 1) + trained
    free = shutil.disk_usage(run.root).free
    if needed > free:
        raise RunFailed(
            f"checkpoints need {bytes_text(needed)}, and {bytes_text(free)} are free at {run.root}",
            help="lower checkpoint.keep, or choose another output_dir",
        )


def _restore(
    checkpoints: Checkpoints, plan: Plan, model: nn.Module, optimizer: Optimizer, resume: bool
) -> tuple[int, list[str], Path | None, dict[str, Any]]:
    """Load the newest whole checkpoint; returns the step, warnings, where it was, and what the loop kept in it."""
    if not resume:
        return 0, [], None, {}
    path, notes = checkpoints.newest()
    if path is None:
        return 0, [*notes, "no checkpoint to resume from: starting at step 0"], None, {}
    restored = checkpoints.load(path, model, plan.recipe.method, optimizer)
    return restored.step, notes, path, restored.progress


def _require_same(before: dict[str, Any], plan: Plan, summary: dict[str, Any], run: RunDir) -> None:
    """Hold that a resumed run is the one that was started.

    Raises:
        RunDirError: The recipe or the data changed.
    """
    # Read as a recipe, so that a field which is newer than the run has its default.
    old, new = (flatten(recipe.model_dump(mode="json")) for recipe in (run.recipe(), plan.recipe))
    changed = [
        f"{key}: {old.get(key)!r} then, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key.split(".")[0] not in _FREE_TO_CHANGE
    ]
    then, now = before.get("plan", {}).get("training", {}), summary["training"]
    changed += [
        f"{what}: {then.get(key)} then, {now[key]} now"
        for key, what in (("world_size", "processes"), ("steps", "steps in all"))
        if then.get(key) != now[key]
    ]
    for name in ("fingerprint", "eval_fingerprint"):
        if before.get("plan", {}).get("data", {}).get(name) != summary["data"][name]:
            changed.append("the content of the data files")
            break
    if changed:
        raise RunDirError(
            f"{run.root} was started with another recipe:\n  " + "\n  ".join(changed),
            help="restore the recipe, or train anew with --overwrite",
        )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
