"""A process that does a study's jobs one after another, so that libraries are imported once.

Jobs come as JSON lines on standard input, their results go as JSON lines to what standard output was; whatever else is
printed goes to standard error. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.artifacts.run_dir import RunDir
from ftune.errors import FtuneError, Interrupted, RunInUse
from ftune.experiments.pool import ended
from ftune.experiments.trials import headline
from ftune.experiments.weights import needs_new_start
from ftune.run.files import write_json
from ftune.run.imports import import_libraries, quiet_libraries
from ftune.run.launch import end_with_parent
from ftune.run.sinks.jsonl import read_events

if TYPE_CHECKING:
    from ftune.artifacts.tuned import Target

__all__ = ["main"]


def main() -> None:
    """Do jobs until standard input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with quiet_libraries():
        import_libraries(peft=True)  # LoRA is in every study
        # What jobs use, here and not in each child.
        import ftune.artifacts.evaluate
        import ftune.artifacts.training  # noqa: F401

        for line in sys.stdin:
            job = json.loads(line)
            result = _in_child(job) if job.get("child") else _done(job)
            answers.write(json.dumps(result) + "\n")
            answers.flush()
            if result.get("interrupted"):
                return


def _done(job: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a job: its ``seconds``, those of ``training`` and ``answering`` in them; or why it failed.

    ``busy`` is no failure: another process holds the run.
    """
    began = time.perf_counter()
    try:
        do = {"train": _train, "evaluate": _evaluate, "test": _test, "tasks": _tasks, "rewind": _rewind}
        spent = do[job["kind"]](job)
    except Interrupted:
        return {"interrupted": True}
    except RunInUse as error:
        return {"busy": error.message}
    except FtuneError as error:
        return {"failed": error.message}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        _let_go()
    return {"seconds": time.perf_counter() - began, **spent}


def _in_child(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job in a child of this process, where the memory of no other job is left and no library is imported again.

    This process must have computed nothing yet: threads and CUDA do not survive a fork.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            end_with_parent()
            os.close(reading)
            os.write(writing, json.dumps(_done(job)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writing)
    before = signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    try:
        with os.fdopen(reading) as result:
            text = result.read()
        _, status = os.waitpid(child, 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    if text:
        found: dict[str, Any] = json.loads(text)
        return found
    return {"failed": f"the process {ended(os.waitstatus_to_exitcode(status))}: see workers.log"}


def _train(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train a recipe, from where it is, up to a step or to its end; from the beginning where its weights are gone.

    One that begins pauses where it is told to, for what was measured there before is measured again.
    """
    from ftune.artifacts.training import train
    from ftune.recipe import load_checked

    overrides = [f"output_dir={json.dumps(job['out'])}"] if "out" in job else []
    loaded, _ = load_checked(Path(job["recipe"]), overrides)
    run = Path(loaded.recipe.output_dir)
    gone = anew = needs_new_start(run)
    before = dict.fromkeys(("training", "answering"), 0.0) if anew else _spent(run)
    if anew or not RunDir(run).exists():
        for step in job.get("pauses", ()):
            train(loaded, resume=not anew, overwrite=anew, until=step, progress=False)
            anew = False
    train(loaded, resume=not anew, overwrite=anew, until=job["until"], progress=False)
    return {"anew": gone, **{what: max(0.0, seconds - before[what]) for what, seconds in _spent(run).items()}}


def _spent(run: Path) -> dict[str, float]:
    """Seconds that a run has computed."""
    spent = {"training": 0.0, "answering": 0.0}
    for event in read_events(run / "metrics.jsonl"):
        if event["event"] in ("step", "eval"):
            spent["training" if event["event"] == "step" else "answering"] += event["seconds"]
    return spent


def _evaluate(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure a run on its validation rows."""
    from ftune.artifacts.evaluate import evaluate
    from ftune.artifacts.tuned import reading

    with reading(Path(job["run"]), unfinished=False) as target:
        return {"answering": evaluate(target, base=False)["seconds"]}


def _test(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure a run, or the model before training, on the test rows; the result is kept apart from the run."""
    from ftune.artifacts.evaluate import evaluate
    from ftune.recipe.schema import DataSource

    with _target(job) as target:
        data = target.recipe.data.model_copy(
            update={"eval": DataSource.model_validate(job["test"]), "eval_fraction": 0.0}
        )
        if target.run is not None and job.get("exports"):
            # first, since predictions.jsonl says that all was measured
            Path(job["out"]).mkdir(parents=True, exist_ok=True)
            write_json(Path(job["out"], "exports.json"), _exports(target.run))
        answered = target.recipe.evaluation.model_copy(update={"max_examples": job.get("rows")})
        target = replace(target, recipe=target.recipe.model_copy(update={"data": data, "evaluation": answered}))
        found = evaluate(target, base=False, forgetting=job["forgetting"], out=Path(job["out"]))
        return {"answering": found["seconds"]}


def _exports(run: RunDir) -> dict[str, dict[str, Any]]:
    """Whether a run can be merged and loaded; what goes wrong there is no failure of the run."""
    from ftune.artifacts.exports import check_exports

    try:
        return check_exports(run)
    except Interrupted:
        raise
    except Exception as error:
        said = headline(error) if isinstance(error, FtuneError) else f"{type(error).__name__}: {error}"
        failed = {"error": None, "why": f"not checked: {said}"}
        return {"merge": failed, "load": failed}


def _tasks(job: Mapping[str, Any]) -> dict[str, float]:
    """Run tasks on a run, or on the model before training; the result is kept beside that of the test rows."""
    from ftune.artifacts.stops import stops_of_run
    from ftune.artifacts.task_scores import item_lines, run_tasks
    from ftune.artifacts.tasks import load_tasks
    from ftune.artifacts.tuned import load_plain, load_target
    from ftune.plan.resolve import resolve
    from ftune.run.files import write_text

    with _target(job) as target:
        tasks = load_tasks(job["tasks"])
        plan = resolve(target.recipe)
        model = load_plain(plan)
        if target.run is not None:
            model = load_target(model, replace(target, recipe=plan.recipe), plan.context)
        began = time.perf_counter()
        found = run_tasks(tasks, model, plan, stops_of_run(target.run, plan))
        spent = time.perf_counter() - began
        out, who = Path(job["out"]), "base" if target.run is None else "tuned"
        write_text(out / "tasks.jsonl", "".join(f"{line}\n" for line in item_lines({who: found})))
        scores = [asdict(score) for score in found.scores]
        write_json(out / "tasks.json", {"tasks": job["tasks"], "items": found.digest, "scores": scores})
    return {"answering": spent}


@contextlib.contextmanager
def _target(job: Mapping[str, Any]) -> Iterator[Target]:
    """The run of a job, kept from being written, or the model before training."""
    from ftune.artifacts.tuned import Target, reading
    from ftune.recipe import load_checked

    if job["run"] is None:
        yield Target(load_checked(Path(job["recipe"]))[0].recipe, None)
    else:
        with reading(Path(job["run"]), unfinished=False) as target:
            yield target


def _rewind(job: Mapping[str, Any]) -> dict[str, float]:
    """Measure a checkpoint of a run, or a part of its change, on validation rows and neutral text; kept apart."""
    from ftune.artifacts.evaluate import evaluate
    from ftune.artifacts.tuned import reading, scaled

    with reading(Path(job["run"]), job["checkpoint"]) as target:
        found = evaluate(scaled(target, job["scale"]), base=False, forgetting="text", out=Path(job["out"]))
        return {"answering": found["seconds"]}


def _let_go() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
