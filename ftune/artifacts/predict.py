"""Answers of a run, or of a base model, to the rows of a new file."""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ftune.artifacts.measure import answerable, answers_of
from ftune.artifacts.same_base import require_elsewhere
from ftune.artifacts.stops import saved_stops
from ftune.artifacts.tuned import Target, load_target
from ftune.data.prompts import read_prompts
from ftune.data.read import read_source
from ftune.errors import DataError, FtuneError
from ftune.plan.base_model import choose_device, load_base, load_tokenizer
from ftune.plan.precision import choose_dtype
from ftune.plan.resolve import context_of
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSource
from ftune.run.outputs import require_output, write_output

__all__ = ["predict"]


def predict(
    target: Target,
    file: str,
    output: Path | None,
    max_new_tokens: int | None = None,
    *,
    recipe_file: Path | None = None,
) -> dict[str, Any]:
    """Answer every row of a file, and write the rows with their answers.

    The file is read as the run's data were: in their format and through their columns. It needs no answers.

    Args:
        target: A run, or a recipe whose base model answers.
        file: A file or directory.
        output: A ``.jsonl`` file, or a stream; None: standard output.
        max_new_tokens: Longest answer; None: as the recipe says.
        recipe_file: The recipe, where the target was named by one: it is not written over.

    Returns:
        ``{"rows": N, "out": PATH or None, "notes": [...]}``.

    Raises:
        DataError: The file cannot be read, or its rows are not like the run's.
        FtuneError: The output cannot be written.
    """
    from ftune.run.objective import Objective

    recipe, run = target.recipe, target.run
    if max_new_tokens is not None:
        recipe = recipe.model_copy(
            update={"evaluation": recipe.evaluation.model_copy(update={"max_new_tokens": max_new_tokens})}
        )
    if output is not None:
        _require_output(output, target, file, recipe_file)
    tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
    format = run.read()["plan"]["data"]["format"] if run is not None else read_source(recipe.data.train)[1]
    rows, items = read_prompts(file, recipe.data, format, tokenizer)
    short, context = answerable(items, recipe)
    if not short:
        raise DataError(
            f"no row leaves room for an answer of {recipe.evaluation.max_new_tokens} tokens in the model's context of "
            f"{context} tokens",
            help="lower it with --max-new-tokens, or give shorter prompts",
        )
    device = choose_device()
    dtype = choose_dtype(recipe.model.dtype, device)
    model = load_base(recipe.model, recipe.method, dtype, device).eval()
    if run is not None:
        model = load_target(model, replace(target, recipe=recipe), context_of(recipe, device, dtype))
    prompts = [item.prompt_ids.tolist() for item in short]
    answers = answers_of(Objective(model, dtype), recipe, tokenizer, prompts, saved_stops(run, recipe, tokenizer))
    of_row = {item.row: answer for item, answer in zip(short, answers, strict=True)}
    lines = [
        json.dumps({"row": number, "answer": of_row[number].whole if number in of_row else None, **_given(row)},
                   ensure_ascii=False, default=str)
        for number, row in rows
    ]  # fmt: skip
    text = "".join(f"{line}\n" for line in lines)
    if output is None:
        sys.stdout.write(text)
    else:
        try:
            write_output(output, text, "--output")
        except (OSError, FtuneError) as error:
            sys.stdout.write(text)  # the work is done: it is not lost for a full disk
            reason = "nobody reads the pipe" if getattr(error, "errno", None) == errno.ENXIO else error
            raise FtuneError(f"cannot write to {output}: {reason}; the answers were printed instead") from error
    notes = [*target.notes, *(note.replace("data.eval: ", "", 1) for note in rows.notes)]
    if len(short) < len(items):
        notes.append(
            f"{len(items) - len(short)} rows have no answer: their prompts are empty or longer than the context"
        )
    return {"rows": len(lines), "out": None if output is None else str(output), "notes": notes}


def _require_output(output: Path, target: Target, file: str, recipe_file: Path | None) -> None:
    """Hold that the answers may be written there, and that they replace nothing that they are made from."""
    require_elsewhere(output, target.run, target.recipe, "--output")
    inputs = [] if recipe_file is None else [(recipe_file, "the recipe")]
    sources: list[tuple[DataSource | None, Literal["train", "eval"], str]] = [
        (DataSource(path=file), "eval", "what is answered"),
        (target.recipe.data.train, "train", "the training data"),
        (target.recipe.data.eval, "eval", "the held-out data"),
    ]
    for source, key, what in sources:
        with contextlib.suppress(FtuneError):  # FILE is read right after; the run's data may be gone
            inputs += [(path, what) for path in locate_data(source, key).files] if source is not None else []
    require_output(output, "--output", inputs)


def _given(row: Any) -> dict[str, Any]:
    """The row as it was, under one key where it has the names that are ours."""
    return {"given": dict(row)} if {"row", "answer"} & set(row) else dict(row)
