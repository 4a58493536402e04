"""What is done with a run: evaluate it, let it answer, merge it, convert it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftune.api.bounds import at_least
from ftune.api.recipes import Recipe, Source, load
from ftune.api.results import Conversion, Evaluation, Generation, Merge
from ftune.errors import FtuneError
from ftune.run.imports import import_for, quiet_libraries

if TYPE_CHECKING:
    from ftune.artifacts.run_dir import RunDir
    from ftune.artifacts.tuned import Target

__all__ = ["convert", "evaluate", "generate", "merge"]

RunOrRecipe = Source
"""A run (its directory, or a ``Run``), or a recipe whose run is looked for in its output_dir."""


def evaluate(
    target: RunOrRecipe,
    *,
    base: bool = False,
    forgetting: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    checkpoint: str | int | None = None,
    scale: float = 1.0,
) -> Evaluation:
    """Measure held-out loss, perplexity and task metrics; the run keeps them in ``eval.json``.

    Args:
        target: A run, or a recipe; of one that was not trained yet, the base model is measured.
        base: Measure the base model too, side by side.
        forgetting: Compare with the base on neutral text and questions, too.
        tasks: Tasks of lm-evaluation-harness to run on both: names or files.
        limit: Of each task the first N items.
        shots: Solved examples before each item; default: the task's.
        checkpoint: Take the checkpoint of this step, also while the run goes on.
        scale: Take this share of what training changed, above 0 and at most 1.

    Raises:
        FtuneError: There is no such run, nothing to measure on, or an argument is wrong.
    """
    from ftune.artifacts.tasks import check_names, load_tasks

    at_least(1, limit=limit)
    at_least(0, shots=shots)
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if names:
        check_names(names)
    elif limit is not None or shots is not None:
        raise FtuneError(f"`{'limit' if limit is not None else 'shots'}` is of `tasks`, and there are none")
    with _reading(target, checkpoint, scale) as found:
        from ftune.artifacts.evaluate import evaluate as measure

        if forgetting and found.run is None:
            raise FtuneError("--forgetting compares a run with its base, and there is no run yet")
        ready = load_tasks(names, limit=limit, shots=shots) if names else None
        data = measure(found, base=base, forgetting=forgetting, tasks=ready)
    return Evaluation(data.get("tuned"), data.get("base"), tuple(data["notes"]), data)


def generate(
    target: RunOrRecipe,
    prompts: str | Sequence[str],
    *,
    base: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    system: str | None = None,
    checkpoint: str | int | None = None,
    scale: float = 1.0,
) -> Generation:
    """Answer prompts, each by itself, put before the model as the run's rows were.

    Args:
        target: A run, or a recipe whose base model answers where it was not trained yet.
        prompts: One, or several.
        base: Let the base model answer.
        max_new_tokens: Longest answer, in tokens.
        temperature: 0: greedy; above: sample.
        system: A system message before every prompt.
        checkpoint: As ``evaluate`` takes it.
        scale: Likewise.

    Raises:
        FtuneError: There is no such run, or a prompt leaves no room for an answer.
    """
    asked = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    at_least(1, max_new_tokens=max_new_tokens)
    if temperature < 0:
        raise FtuneError(f"temperature={temperature:g}: at least 0")
    with _reading(target, checkpoint, scale) as found:
        from ftune.artifacts.chat import Chat

        talk = Chat(found, max_new_tokens=max_new_tokens, temperature=temperature, base=base, system=system)
        answers = []
        for prompt in asked:
            talk.command("/new")
            answers.append(talk.answer(prompt, io.StringIO()))
    return Generation(asked, tuple(answers), found.notes)


def merge(
    run: RunOrRecipe,
    out: str | os.PathLike[str] | None = None,
    *,
    dtype: str | None = None,
    by_shard: bool | None = None,
    checkpoint: str | int | None = None,
    scale: float = 1.0,
) -> Merge:
    """Fold what was trained into the base weights: a plain model is written, read back and compared with the tuned one.

    Args:
        run: A run, or the recipe of one.
        out: Where to write; default ``RUN/merged``.
        dtype: ``float32`` or ``bfloat16``; default: what the run computed in.
        by_shard: One tensor at a time, or all at once; default: what memory allows.
        checkpoint: Merge the checkpoint of this step, not the end.
        scale: Merge this share of what training changed, above 0 and at most 1.

    Raises:
        FtuneError: There is no such run, or its method cannot be merged.
        RunFailed: The merged model is not the one that was trained; nothing is left.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise FtuneError(f"dtype {dtype}: not a dtype that can be merged to", help="float32 or bfloat16")
    with _run(run) as found:
        from ftune.artifacts.merge import merge as merge_run

        data = merge_run(found, _path(out), dtype, by_shard, checkpoint=_step(checkpoint), scale=scale)
    return Merge(Path(data["out"]), data)


def convert(run: RunOrRecipe, out: str | os.PathLike[str] | None = None, *, rank: int | None = None) -> Conversion:
    """Write what was trained as a plain LoRA adapter, read it back, and compare it with the tuned model.

    Args:
        run: A run, or the recipe of one.
        out: Where to write; default ``RUN/lora``.
        rank: Rank of the adapter; default: the least that is exact.

    Raises:
        FtuneError: There is no such run, or its update is no low-rank matrix and no rank was asked for.
    """
    at_least(1, rank=rank)
    with _run(run) as found:
        from ftune.artifacts.convert import to_lora

        data = to_lora(found, _path(out), rank)
    return Conversion(Path(data["out"]), data)


@contextlib.contextmanager
def _reading(target: RunOrRecipe, checkpoint: str | int | None, scale: float) -> Iterator[Target]:
    """A run or a recipe, kept from being trained meanwhile."""
    with quiet_libraries():
        if not isinstance(target, (Recipe, Mapping)):
            import_for(Path(target).expanduser())
        from ftune.artifacts.tuned import reading, scaled

        if isinstance(target, (Recipe, Mapping)):
            where: Any = load(target).values
        else:
            where = Path(target).expanduser()
        with reading(where, _step(checkpoint), unfinished=True) as found:
            yield scaled(found, scale)


@contextlib.contextmanager
def _run(run: RunOrRecipe) -> Iterator[RunDir]:
    """A run's directory, kept from being trained meanwhile."""
    with quiet_libraries():
        from ftune.artifacts.run_dir import RunDir

        if isinstance(run, (Recipe, Mapping)):
            root = load(run).output_dir
        else:
            root = Path(run).expanduser()
            import_for(root)
            root = load(root).output_dir if root.suffix in (".yaml", ".yml") and root.is_file() else root
        with RunDir(root).reading():
            yield RunDir(root)


def _path(path: str | os.PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


def _step(checkpoint: str | int | None) -> str | None:
    return None if checkpoint is None else str(checkpoint)
