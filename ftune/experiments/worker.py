"""A process that does a study's jobs one after another, so that libraries are imported once.

Jobs come as JSON lines on standard input, their results go as JSON lines to what standard output was; whatever else is
printed goes to standard error. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune.errors import FtuneError, Interrupted
from ftune.run.imports import quiet_libraries
from ftune.run.launch import end_with_parent

__all__ = ["main"]


def main() -> None:
    """Do jobs until standard input ends."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with quiet_libraries():
        for line in sys.stdin:
            result = _done(json.loads(line))
            answers.write(json.dumps(result) + "\n")
            answers.flush()
            if result.get("interrupted"):
                return


def _done(job: Mapping[str, Any]) -> dict[str, Any]:
    """What became of a job: ``{}``, or why it failed."""
    try:
        {"train": _train, "evaluate": _evaluate, "test": _test}[job["kind"]](job)
    except Interrupted:
        return {"interrupted": True}
    except FtuneError as error:
        return {"failed": error.message}
    except Exception as error:
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        _let_go()
    return {}


def _train(job: Mapping[str, Any]) -> None:
    """Train a recipe, from where it is, up to a step or to its end."""
    from ftune.artifacts.training import train
    from ftune.recipe import load_checked
    from ftune.run.imports import import_libraries

    loaded, _ = load_checked(Path(job["recipe"]))
    import_libraries(peft=loaded.recipe.method.saved_as == "peft")
    train(loaded, resume=True, until=job["until"], progress=False)


def _evaluate(job: Mapping[str, Any]) -> None:
    """Measure a run on its validation rows."""
    from ftune.artifacts.evaluate import evaluate
    from ftune.artifacts.tuned import reading

    with reading(Path(job["run"]), unfinished=False) as target:
        evaluate(target, base=False)


def _test(job: Mapping[str, Any]) -> None:
    """Measure a run, or the model before training, on the test rows; the result is kept apart from the run."""
    from ftune.artifacts.evaluate import evaluate
    from ftune.artifacts.tuned import Target, reading
    from ftune.recipe import load_checked
    from ftune.recipe.schema import DataSource

    with contextlib.ExitStack() as held:
        if job["run"] is None:
            target = Target(load_checked(Path(job["recipe"]))[0].recipe, None)
        else:
            target = held.enter_context(reading(Path(job["run"]), unfinished=False))
        data = target.recipe.data.model_copy(
            update={"eval": DataSource.model_validate(job["test"]), "eval_fraction": 0.0}
        )
        target = replace(target, recipe=target.recipe.model_copy(update={"data": data}))
        evaluate(target, base=False, forgetting=job["forgetting"], out=Path(job["out"]))


def _let_go() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
