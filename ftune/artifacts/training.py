"""Run a recipe into a run directory."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.agreement import facts_of
from ftune.artifacts.card import write_card
from ftune.artifacts.kernels import replay_of
from ftune.artifacts.objective import agreed, loss_of, make_objective
from ftune.artifacts.resume import evaluation_missed, record_changes, require_same, resolve_again, restore
from ftune.artifacts.run_dir import RunDir, package_versions
from ftune.artifacts.same_base import require_inputs_elsewhere
from ftune.artifacts.stops import stops_of_plan, write_generation_config
from ftune.artifacts.stored import digests_of
from ftune.artifacts.tally import Tally
from ftune.artifacts.world import in_world, note_of, with_accumulation
from ftune.errors import Interrupted, RunFailed
from ftune.human import bytes_text, now_text
from ftune.ops.kernels import why_not_fused
from ftune.plan.base_model import configured
from ftune.plan.build import build
from ftune.plan.engine import EngineChoice, engine_for, require_several
from ftune.plan.pinned import pins
from ftune.plan.plan import Plan
from ftune.plan.resolve import resolve
from ftune.plan.shapes import auto_class
from ftune.plan.slow import slower_on
from ftune.plan.summary import summary_of
from ftune.recipe.load import Loaded
from ftune.recipe.schema import Recipe
from ftune.run.checkpoint import Checkpoints
from ftune.run.engines import make_engine
from ftune.run.events import Event, Note, Resumed, RunEnd, RunStart, Saved, Sink, Vitals
from ftune.run.files import as_os_error, failed, new_directory
from ftune.run.launch import launched
from ftune.run.lock import RunLock
from ftune.run.loop import Loop
from ftune.run.out_of_memory import is_out_of_memory, out_of_memory
from ftune.run.processes import join_processes, require_agreement, require_launcher
from ftune.run.signals import StopRequest
from ftune.run.sinks.guarded import Guarded
from ftune.run.sinks.jsonl import JsonlSink, truncate_after
from ftune.run.sinks.progress import ProgressSink
from ftune.run.sinks.tracker import TRACKED, TrackerSink, flatten
from ftune.run.through_host import block_by_block, move_beside_base
from ftune.streams import tell as print_line

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

__all__ = ["train"]

_LOCAL_SINKS = ("progress", "jsonl")


@dataclass(frozen=True)
class _Asked:
    """What was asked for beside the recipe: the arguments of ``train``."""

    resume: bool
    overwrite: bool
    accept_changed_data: bool
    accept_changed_model: bool
    show_plan: Callable[[dict[str, Any]], None]
    progress: bool
    auto_batch: bool
    until: int | None
    sinks: Sequence[Sink]
    tell: Callable[[str], None]


def train(
    loaded: Loaded,
    *,
    resume: bool = False,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    accept_changed_model: bool = False,
    show_plan: Callable[[dict[str, Any]], None] = lambda summary: None,
    progress: bool = True,
    engine: str | None = None,
    auto_batch: bool = False,
    until: int | None = None,
    sinks: Sequence[Sink] = (),
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a recipe; returns the record that ``run.json`` keeps.

    Args:
        loaded: The recipe and its text.
        resume: Continue from the newest whole checkpoint of this run directory; start when there is none.
        overwrite: Replace a run that the directory holds.
        accept_changed_data: Go on although the data is not what the run began with; ``run.json`` keeps that.
        accept_changed_model: The same of the base model's files.
        show_plan: Called with the plan before any weights are loaded.
        progress: Whether progress may be written to standard error.
        auto_batch: Halve micro-batches where memory runs out: the same result in more portions.
        engine: How processes share an update (``ftune.plan.engine``); None: as the launch configuration says.
        until: Pause after this update: evaluated, saved, and gone on with by ``resume``. None: train to the end.
        sinks: Receive every event, beside those of ``tracking``; what one raises ends the run.
        tell: Takes notes and warnings, a line each. Default: standard error.

    Raises:
        FtuneError: The user's mistake (exit code 2), a broken promise (1) or a signal (130, 143).
    """
    run = RunDir(Path(loaded.recipe.output_dir).expanduser())
    if overwrite and run.exists():
        require_inputs_elsewhere(run, loaded.recipe)
    choice = engine_for(loaded.recipe, engine, os.environ, auto_batch=auto_batch)
    with contextlib.ExitStack() as held:
        # Or accelerate shards beside the engine, which does all that the configuration asks for.
        held.enter_context(_unset("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
        require_launcher()
        require_several(choice, int(os.environ.get("WORLD_SIZE", "1")))
        accelerator = join_processes(offload=choice.offload)
        if accelerator.is_main_process:
            run.prepare(overwrite=overwrite, resume=resume)
            held.enter_context(RunLock(run.root))
            # Again: another process may have trained here between the look and the lock.
            run.prepare(overwrite=overwrite, resume=resume)
            run.sweep()
        asked = _Asked(
            resume,
            overwrite,
            accept_changed_data,
            accept_changed_model,
            show_plan,
            progress,
            auto_batch,
            until,
            sinks,
            tell or print_line,
        )
        return _train(loaded, run, accelerator, choice, asked)


def _train(
    loaded: Loaded, run: RunDir, accelerator: Accelerator, choice: EngineChoice, asked: _Asked
) -> dict[str, Any]:
    recipe, main, world = loaded.recipe, accelerator.is_main_process, accelerator.num_processes
    accelerator.wait_for_everyone()
    before = run.read() if asked.resume and run.exists() else None
    began = run.recipe() if before is not None else None
    if before is not None and began is not None:
        recipe = in_world(run.as_begun(recipe), began, before, world)
    if before is not None and asked.accept_changed_data:
        plan = resolve_again(recipe, before, world, choice)
    else:
        plan = resolve(recipe, world_size=world, engine=choice)
    if began is not None:
        plan = replace(plan, slower=slower_on(plan.machine, began, of_run=True))
    # What a resumed run is in: its number of processes may have changed, and with it how an update is split.
    resolved = plan.recipe
    if began is not None and before is not None and plan.global_batch == before["plan"]["training"]["global_batch"]:
        resolved = with_accumulation(resolved, began.training.accumulation)
    summary = summary_of(plan)
    if before is not None:  # what was chosen then, and why, is part of the recipe now
        summary["training"]["chosen"] = before["plan"]["training"].get("chosen", [])
    if world > 1:
        require_agreement(accelerator, facts_of(plan, resolved))
    if before is not None:
        require_same(
            before,
            resolved,
            summary,
            run,
            accept_changed_data=asked.accept_changed_data,
            accept_changed_model=asked.accept_changed_model,
        )
        if before.get("status") == "finished":
            # No error: whoever starts a job again until it ends well, a cluster's scheduler, asks for no more.
            if main:
                asked.tell(f"note: {run.root} is already finished; --overwrite trains it again")
            return before
    if main:
        asked.show_plan(summary)

    record: dict[str, Any] = {
        "recipe": loaded.text,
        "overrides": list(loaded.overrides),
        "pinned": before["pinned"] if before and "pinned" in before else pins(recipe, plan.recipe),
        "resolved": resolved.model_dump(mode="json"),
        "plan": summary,
        "measured": {},
        "vitals": {},
        "vitals_line": "",
        "versions": package_versions(),
        "device": summary["device"] | {"processes": accelerator.num_processes, "engine": choice.name},
        "seed": recipe.training.seed,
        "status": "running",
        "started": now_text(),
    }
    sinks: list[Sink] = []
    trackers: list[Guarded] = []
    command = _command(loaded, world, choice, asked)
    clock = time.perf_counter()
    tally = Tally()
    stop, status = StopRequest(), "failed"
    try:
        with stop:
            model, optimizer = build(plan)
            loss = loss_of(before) if before is not None else None
            with _computing(model, plan):
                objective, record["lean"] = make_objective(model, plan, accelerator, loss)
            if plan.through_host:
                move_beside_base(model, plan.context.device, trained=recipe.method.artifact == "adapter")
            record["optimizer"] = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            checkpoints = Checkpoints(run.checkpoints, recipe.checkpoint.keep)
            if main:
                _rehearse(plan, model, run)
                old = run.contents()
                trackers = _trackers(plan.recipe, run, asked.tell)
                if asked.overwrite:
                    # Only now: a recipe that cannot run must not cost the run it would have replaced.
                    run.clear(old)
            start, notes, found, kept = restore(
                checkpoints, plan, model, optimizer, accelerator, asked.resume, run.metrics
            )
            if before is not None:
                notes += record_changes(record, before, summary, start)
            if main:
                truncate_after(run.metrics, start)
                tally.recall(run.metrics, kept)
                run.write(record)
                sinks = [*_local_sinks(plan.recipe, run, asked), *trackers, *asked.sinks]
            sinks.append(tally)

            def emit(event: Event) -> None:
                if isinstance(event, Note) and main:
                    asked.tell(f"note: {event.text}")
                for sink in sinks:
                    sink.receive(event)

            told = note_of(before["plan"]["training"], summary["training"], model) if before is not None else []
            if loss is not None and loss != record["lean"]["loss"]:
                notes.append("the run began with Liger's loss, which is not here: ftune's own differs by rounding")
            if kept.pop("compile", False):  # a run of before, when `training.compile` was a field
                notes.append(
                    "the run began with compiled norms and gates, which are no more: others differ by rounding"
                )
            if plan.context.device.type == "cuda" and (why := why_not_fused()):
                notes.append(f"norms, gates and the loss are computed without fused kernels, which is slower: {why}")
            for line in [*(f"warning: {note}" for note in notes), *(told if main else ())]:
                asked.tell(line)
            emit(RunStart(start, plan.total_steps))
            if found is not None:
                emit(Resumed(start, found.name))
            shared = make_engine(choice, accelerator, auto_batch=asked.auto_batch)
            replay, why_not = replay_of(plan, model)
            if replay is None and recipe.training.cuda_graphs is True and main:
                asked.tell(f"note: blocks are not replayed from CUDA graphs: {why_not}")
            loop = Loop(
                plan,
                accelerator,
                shared,
                objective,
                optimizer,
                checkpoints,
                emit,
                stop,
                kept,
                asked.auto_batch,
                replay,
                asked.until,
            )
            try:
                missed = agreed(accelerator, not main or evaluation_missed(plan, start, run.metrics, asked.until))
                complete = loop.run(start, evaluate_first=missed)
            finally:
                if replay is not None:
                    if replay.why_not is not None:
                        since = f"after {replay.replayed} micro-batches " if replay.replayed else ""
                        asked.tell(f"note: {since}CUDA graphs were given up: {replay.why_not}")
                    record["lean"]["graphs"] = replay.close()
            if complete:
                with shared.whole_adapters(model, recipe.method):
                    record["vitals"] = recipe.method.vitals(model, optimizer)
                record["vitals_line"] = recipe.method.vitals_line(record["vitals"])
                emit(Vitals(plan.total_steps, record["vitals"]))
                _require_at_work(recipe, record["vitals"])
                shared.make_whole(model)
                if main:
                    with new_directory(run.root / recipe.method.artifact) as out, as_os_error():
                        _save_artifact(plan, model, out)
                        record["measured"] = tally.measured(plan.memory.total)
                        record["effect"] = tally.effect(summary["training"])
                        record["measured"]["wall_seconds"] = time.perf_counter() - clock
                        write_card(out, record, auto_class(configured(recipe.model, recipe.method)).__name__)
                        record["artifact_sha256"] = digests_of(out)
                    emit(Saved(plan.total_steps, recipe.method.artifact))
            status = "finished" if complete else "paused"
    except Interrupted as interrupted:
        status = "interrupted"
        interrupted.help = f"continue with `{command} --resume`"
        raise
    except KeyboardInterrupt as at_once:
        status = "interrupted"
        raise _stopped_at_once(stop, run if sinks else None, plan, command) from at_once
    except OSError as error:
        record["error"] = str(error)
        raise _unwritten(error, run) from error
    except BaseException as error:
        step = (tally.last.step if tally.last else 0) if sinks else None
        explained = out_of_memory(plan, step) if is_out_of_memory(error) else error
        if stop.signal_number and isinstance(explained, RuntimeError):
            status = "interrupted"  # the signal ended another process first, and this one lost its connection
        else:
            record["error"] = str(explained)
        raise explained from error.__cause__ if explained is error else error
    finally:
        if not sinks:
            for tracker in trackers:
                tracker.close()
        if sinks and main:  # a run that never began leaves the record of another as it is
            last = tally.last.step if tally.last else 0
            record |= {"status": status, "ended": now_text()}
            record["measured"] = record["measured"] or tally.measured(plan.memory.total)
            # Where the disk is full, what went wrong first is what to say; run.json stays as it was, whole.
            unwritten: OSError | None = None
            for sink in sinks:
                _end(sink, RunEnd(last, status))
            record["tracking_failed"] = {
                sink.name: sink.loss for sink in sinks if isinstance(sink, Guarded) and sink.loss is not None
            }
            try:
                run.write(record)
            except OSError as error:
                unwritten = error
            for sink in sinks:
                if isinstance(sink, Guarded) and sink.summary is not None:
                    asked.tell(sink.summary)
            if unwritten and status != "failed":
                raise _unwritten(unwritten, run) from unwritten
    accelerator.wait_for_everyone()
    return record


def _computing(model: nn.Module, plan: Plan) -> contextlib.AbstractContextManager[None]:
    """A context in which the model computes on the run's device, before an engine has shared it out."""
    return block_by_block(model, plan.context.device) if plan.through_host else contextlib.nullcontext()


@contextlib.contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Hide these variables of the environment; another run of this Python process finds them again."""
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _command(loaded: Loaded, world: int, choice: EngineChoice, asked: _Asked) -> str:
    """How this run was started; under another launcher than ftune's own, without that launcher."""
    words = ["ftune", "train", shlex.quote(str(loaded.path))]
    words += [f"--set {shlex.quote(override)}" for override in loaded.overrides]
    words += [f"--num-processes {world}"] if launched() else []
    words += [f"--engine {choice.name}"] if choice.name != "ddp" else []
    words += ["--auto-batch"] if asked.auto_batch else []
    return " ".join(words)


def _stopped_at_once(stop: StopRequest, run: RunDir | None, plan: Plan, command: str) -> Interrupted:
    """What to say where a run was stopped in the midst of something: what it kept, and how to go on.

    Args:
        stop: Knows the signal and the step.
        run: Where checkpoints are; None where the run had not begun.
        plan: The run's.
        command: How it was started.
    """
    number = stop.signal_number or signal.SIGINT
    if run is None:
        help = f"`{command}` starts it"
        return Interrupted("stopped before training began", signal_number=number, help=help, together=False)
    steps = Checkpoints(run.checkpoints, plan.recipe.checkpoint.keep).steps()
    kept = f"kept: the checkpoint after step {steps[-1]}" if steps else "there is no checkpoint yet"
    where = f" in step {stop.step} of {plan.total_steps}" if stop.step else " before the first step"
    again = f"continue with `{command} --resume`" + ("" if steps else ", which begins at step 0")
    return Interrupted(f"stopped at once{where}; {kept}", signal_number=number, help=again, together=False)


def _end(sink: Sink, event: RunEnd) -> None:
    with contextlib.closing(sink):
        sink.receive(event)


def _unwritten(error: OSError, run: RunDir) -> RunFailed:
    of_the_disk = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
    told = failed(error, "writing the run" if of_the_disk else "the run", run.root)
    if run.root.is_dir():
        mend = told.help or "mend that"
        told.help = f"{mend}; then continue with --resume: checkpoints that were complete are untouched"
    return told


def _local_sinks(recipe: Recipe, run: RunDir, asked: _Asked) -> list[Sink]:
    sinks: list[Sink] = []
    if "jsonl" in recipe.tracking:
        sinks.append(Guarded("jsonl", lambda: JsonlSink(run.metrics), asked.tell, again=True))
    if asked.progress and "progress" in recipe.tracking:
        sinks.append(ProgressSink(sys.stderr, live=sys.stderr.isatty()))
    return sinks


def _trackers(recipe: Recipe, run: RunDir, tell: Callable[[str], None]) -> list[Guarded]:
    """Start the trackers; one that cannot be started is told of, and the run goes on without it."""
    settings = flatten(recipe.model_dump(mode="json"))
    return [
        Guarded(name, partial(TrackerSink, name, run.root.name, settings, run.tracking), tell, takes=TRACKED)
        for name in recipe.tracking
        if name not in _LOCAL_SINKS
    ]


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
    write_generation_config(out, model, plan.tokenizer, stops_of_plan(plan))


def _rehearse(plan: Plan, model: nn.Module, run: RunDir) -> None:
    """Save once before the first step, so that a run does not fail at its end.

    Raises:
        RunFailed: What is trained cannot be saved, or the disk is too small for the checkpoints.
    """
    try:
        with tempfile.TemporaryDirectory(dir=run.root, prefix=".tmp-rehearsal-") as scratch, as_os_error():
            _save_artifact(plan, model, Path(scratch))
            digests_of(Path(scratch))  # reads back what was written, as the end of the run does
    except OSError:
        raise
    except Exception as error:
        raise RunFailed(f"the result of this run could not be saved: {error}") from error
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    one = trained + plan.recipe.method.optimizer_bytes(plan.shape, plan.recipe.optimizer.name)
    every = plan.recipe.checkpoint.every_steps or plan.total_steps
    saves = math.ceil(plan.total_steps / every)  # the last at the end; a run that is stopped before saves no more
    needed = one * min(plan.recipe.checkpoint.keep + 1, saves) + trained
    free = shutil.disk_usage(run.root).free
    if needed > free:
        raise RunFailed(
            f"checkpoints need {bytes_text(needed)}, and {bytes_text(free)} are free at {run.root}",
            help="lower checkpoint.keep, or choose another output_dir",
        )
