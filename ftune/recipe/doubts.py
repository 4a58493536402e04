"""What of a recipe may not be meant so."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ftune.errors import FtuneError
from ftune.methods import Problem
from ftune.recipe.data_files import locate_data
from ftune.recipe.schema import DataSource, Recipe

__all__ = ["doubtful"]


def doubtful(recipe: Recipe) -> Iterator[Problem]:
    """What may not be meant so, each with what to write instead."""
    training = recipe.training
    rows = training.micro_batch_size * (training.gradient_accumulation_steps or 1)
    if rows > 4096:
        product = f"{training.micro_batch_size} x {training.gradient_accumulation_steps} = {rows}"
        yield Problem(
            ("training",),
            f"one update takes {product} rows",
            "`gradient_accumulation_steps` counts micro-batches, not rows",
        )
    rate, usual = recipe.learning_rate, recipe.method.default_learning_rate
    if rate > 100 * usual:
        yield Problem(
            ("optimizer", "learning_rate"),
            f"a learning rate of {rate:g} is {rate / usual:.0f} times the usual one",
            f"method `{recipe.method.name}` usually takes {usual:g}",
        )
    periods = {"checkpoint": recipe.checkpoint.every_steps, "evaluation": recipe.evaluation.every_steps}
    for block, period in periods.items():
        if period is not None and training.max_steps is not None and period > training.max_steps:
            yield Problem(
                (block, "every_steps"),
                f"{period} steps never pass in a run of {training.max_steps}",
                "it happens at the end only",
            )
    train, held_out = recipe.data.train, recipe.data.eval
    if held_out is not None and _same_rows(train, held_out):
        yield Problem(
            ("data", "eval"),
            "the held-out rows are the training rows",
            "use `eval_fraction` to hold some of them out",
        )


def _escapes(recipe: Recipe) -> Iterator[Problem]:
    """A line break or a tab as two characters: YAML reads these between double quotes only."""
    for key, source in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        given = source.columns.given() if source is not None and source.columns else {}
        texts: dict[tuple[str, ...], str] = {("columns", name): text for name, text in given.items()}
        if source is not None and source.split_on is not None:
            texts[("split_on",)] = source.split_on
        for path, text in texts.items():
            if found := re.search(r"\\[nt]", text):
                yield Problem(
                    ("data", key, *path),
                    f"`{found[0]}` is two characters here, and no {'line break' if found[0][1] == 'n' else 'tab'}",
                    "write the text between double quotes",
                )


def _same_rows(train: DataSource, held_out: DataSource) -> bool:
    """Whether both name the same rows; one directory may give other files to each."""
    same = ("path", "subset", "split")
    if any(getattr(train, name) != getattr(held_out, name) for name in same):
        return False
    try:
        return locate_data(train, "train").files == locate_data(held_out, "eval").files
    except FtuneError:
        return False
