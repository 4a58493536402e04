"""Answers of a run, or of a base model, to the rows of a new file."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftune.artifacts.measure import answers_of
from ftune.artifacts.stops import saved_stops
from ftune.artifacts.tuned import Target, load_target
from ftune.data.prompts import read_prompts
from ftune.data.read import read_source
from ftune.errors import DataError, FtuneError
from ftune.plan.base_model import choose_device, configured, load_base, load_tokenizer
from ftune.plan.positions import context_of_model
from ftune.plan.precision import choose_dtype
from ftune.plan.resolve import context_of
from ftune.run.files import write_text

__all__ = ["predict"]


def predict(target: Target, file: str, output: Path | None, max_new_tokens: int | None = None) -> dict[str, Any]:
    """Answer every row of a file, and write the rows with their answers.

    The file is read as the run's data were: in their format and through their columns. It needs no answers.

    Args:
        target: A run, or a recipe whose base model answers.
        file: A file or directory.
        output: A ``.jsonl`` file; None: standard output.
        max_new_tokens: Longest answer; None: as the recipe says.

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
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise FtuneError(f"cannot write to {output}", help="--output names a file in a directory that exists")
    tokenizer = load_tokenizer(recipe.model, recipe.data.chat_template)
    format = run.read()["plan"]["data"]["format"] if run is not None else read_source(recipe.data.train)[1]
    rows, items = read_prompts(file, recipe.data, format, tokenizer)
    config = configured(recipe.model, recipe.method)
    context_length = context_of_model(config) or sys.maxsize
    room = context_length - recipe.method.virtual_positions - recipe.evaluation.max_new_tokens
    short = [item for item in items if 0 < len(item.prompt_ids) <= room]
    if not short:
        raise DataError(
            f"no row leaves room for an answer of {recipe.evaluation.max_new_tokens} tokens in the model's context of "
            f"{context_length} tokens",
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
            write_text(output, text)
        except OSError as error:
            sys.stdout.write(text)  # the work is done: it is not lost for a full disk
            raise FtuneError(f"cannot write to {output}: {error}; the answers were printed instead") from error
    notes = list(target.notes)
    if len(short) < len(items):
        notes.append(
            f"{len(items) - len(short)} rows have no answer: their prompts are empty or longer than the context"
        )
    return {"rows": len(lines), "out": None if output is None else str(output), "notes": notes}


def _given(row: Any) -> dict[str, Any]:
    """The row as it was, under one key where it has the names that are ours."""
    return {"given": dict(row)} if {"row", "answer"} & set(row) else dict(row)
