"""Training settings that a recipe leaves out, chosen by the size of its data.

A hundred updates are aimed at, which small data does not have by itself:

- rows in an update: a hundredth of an epoch's, as a power of two, 1 to 32; of short rows that are not packed up to 8 at
  least, as long as an epoch keeps ten updates;
- epochs: as many as make 100 updates, 1 to 10;
- learning rate: the method's own is for a thousand updates and more; for ``n`` fewer it is ``sqrt(1000 / n)`` times
  that, as far as the method bears (``Method.few_updates_factor``).

What a recipe gives is never changed. What is chosen is written out in the plan and in ``run.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftune.recipe.schema import Recipe, TrainingSpec

if TYPE_CHECKING:
    from ftune.methods import Method

__all__ = ["Choice", "Length", "choose_length", "choose_rate", "few_updates", "usual_rate"]

UPDATES = 100
"""Updates that a run of little data is given; AdaLoRA's three phases and a warm-up fit in no fewer."""
MOST_ROWS = 32
SHORT_ROWS = 8
"""Rows that an update has at least where each is a short example: the gradient of one alone is mostly noise."""
MOST_EPOCHS = 10
MANY_UPDATES = 1000
"""Updates from which on a method's own rate is taken as it is."""
DOZENS = 40
"""Updates up to which it is taken times the method's ``few_updates_factor``."""
FEW_UPDATES = 30
"""Updates below which the plan says what to change."""


@dataclass(frozen=True)
class Choice:
    """A value that the recipe left out.

    Attributes:
        field: Where it belongs in the recipe, ``training.epochs``.
        value: What was chosen.
        why: The rule, in a few words.
    """

    field: str
    value: float | str | bool
    why: str


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Attributes:
        training: The recipe's block with what it left out written out.
        steps_per_epoch: Updates in one pass over the rows.
        total_steps: Updates in the run.
        choices: What was chosen.
    """

    training: TrainingSpec
    steps_per_epoch: int
    total_steps: int
    choices: tuple[Choice, ...]


def choose_length(
    training: TrainingSpec, rows: int, world_size: int, *, fill: float = 1.0, one_pass: bool = False
) -> Length:
    """Settle the rows of an update and the epochs.

    Args:
        training: As the recipe has it.
        rows: Training rows, after packing.
        world_size: Processes that share an update.
        fill: Tokens of a row on average, as a share of the longest that the recipe allows; packed rows are full.
        one_pass: Whether the method updates weights in the backward pass, so that nothing can be accumulated.
    """
    choices: list[Choice] = []
    smallest = training.micro_batch_size * world_size
    accumulation = training.gradient_accumulation_steps
    if accumulation is None:
        least = min(SHORT_ROWS, 1 / fill, rows / MOST_EPOCHS)
        wanted = 2 ** int(math.log2(min(MOST_ROWS, max(1, least, rows // UPDATES))))
        accumulation = 1 if one_pass else max(1, wanted // smallest)
        why = f"{_rows(accumulation * smallest)} of {rows:,} in an update"
        choices.append(Choice("training.gradient_accumulation_steps", accumulation, why))
    steps_per_epoch = math.ceil(rows / (smallest * accumulation))
    epochs = training.epochs
    if training.max_steps is None:
        if epochs is None:
            epochs = float(min(MOST_EPOCHS, math.ceil(UPDATES / steps_per_epoch)))
            why = f"{UPDATES} updates or more" if epochs * steps_per_epoch >= UPDATES else f"at most {MOST_EPOCHS}"
            choices.append(Choice("training.epochs", epochs, why))
        total = math.ceil(epochs * steps_per_epoch)
    else:
        total = training.max_steps if epochs is None else min(training.max_steps, math.ceil(epochs * steps_per_epoch))
    settled = training.model_copy(update={"gradient_accumulation_steps": accumulation, "epochs": epochs})
    return Length(settled, steps_per_epoch, total, tuple(choices))


def choose_rate(recipe: Recipe, total_steps: int) -> tuple[float, tuple[Choice, ...]]:
    """Settle the learning rate of a run of so many updates; it has two digits where it is chosen."""
    if recipe.optimizer.learning_rate is not None:
        return recipe.optimizer.learning_rate, ()
    own, factor = recipe.method.default_learning_rate, _factor(recipe.method, total_steps)
    rate = usual_rate(recipe.method, total_steps)
    why = f"{recipe.method.name}'s own {own:g}"
    if rate != own:
        why += f" x {factor:.1f} for {total_steps:,} update{'s' * (total_steps != 1)}"
    return rate, (Choice("optimizer.learning_rate", rate, why),)


def usual_rate(method: Method, total_steps: int) -> float:
    """The rate that is chosen for so many updates where a recipe gives none."""
    return float(f"{method.default_learning_rate * _factor(method, total_steps):.2g}")


def few_updates(recipe: Recipe, total_steps: int, steps_per_epoch: int, *, packed: bool) -> str | None:
    """What to change in a settled recipe that makes too few updates to learn much, or None where it makes enough.

    packed: Whether rows hold several examples.
    """
    if total_steps >= FEW_UPDATES:
        return None
    training, changes = recipe.training, []
    if training.max_steps == total_steps:
        changes.append(f"`training.max_steps: {UPDATES}`, or leave it out")
    if training.accumulation > 1:
        changes.append(f"`training.gradient_accumulation_steps: 1` makes {training.accumulation} times as many")
    if training.max_steps is None and (training.epochs or 0) < MOST_EPOCHS:
        epochs = min(MOST_EPOCHS, math.ceil(UPDATES / steps_per_epoch))
        changes.append(f"`training.epochs: {epochs}` makes {epochs * steps_per_epoch}")
    if steps_per_epoch < FEW_UPDATES and packed:
        changes.append("`data.packing: false` makes more of them, of fewer examples each")
    if not changes:
        changes.append("more rows are needed than there are")
    text = f"only {total_steps} update{'s' * (total_steps != 1)}, in which little is learned: {'; or '.join(changes)}"
    usual = usual_rate(recipe.method, total_steps)
    if recipe.learning_rate < usual / 3:
        text += f". So few need a higher learning rate than {recipe.learning_rate:g}: try {usual:g}"
    return text


def _factor(method: Method, updates: int) -> float:
    """A power of how many times fewer updates than many there are: a square root where the factor is 5."""
    times_fewer = min(MANY_UPDATES / DOZENS, max(1.0, MANY_UPDATES / updates))
    return float(method.few_updates_factor ** math.log(times_fewer, MANY_UPDATES / DOZENS))


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
