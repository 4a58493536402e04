"""One model on the held-out rows: loss, answers, and what the metrics say of them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftune.artifacts.generate import decoded, greedy
from ftune.artifacts.one_pass import Row, read_and_answer
from ftune.artifacts.scores import Scores, score
from ftune.artifacts.stops import end_token_ids, text_stop, until
from ftune.data.answers import Answer
from ftune.data.splits import GenerationItem
from ftune.plan.base_model import configured
from ftune.plan.plan import Plan
from ftune.plan.positions import context_of_model
from ftune.plan.shapes import read_shape
from ftune.recipe.schema import Recipe
from ftune.run.evaluation import held_out_loss
from ftune.run.objective import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Measured", "answerable", "answers_of", "measure"]


@dataclass(frozen=True)
class Measured:
    """What was found of one model.

    Attributes:
        numbers: ``loss``, ``perplexity``, ``target_tokens``, ``seconds``; ``metrics`` and ``classes`` where asked for.
        answers: One for each item.
        scores: Of the answers; None without metrics.
    """

    numbers: dict[str, Any]
    answers: list[Answer]
    scores: Scores | None


def measure(
    objective: Objective, plan: Plan, items: Sequence[GenerationItem], stops: Sequence[int], accelerator: Accelerator
) -> Measured:
    """Measure held-out loss and metrics.

    In float32 both come from one reading of the rows, each row by itself. In 16 bits the order of sums shows in the
    third digit of a loss: there it is computed as the run computed it, in batches of its own.

    Args:
        objective: The model (``ftune.artifacts.objective``).
        plan: Whose held-out split, and how answers are generated.
        items: What to answer; empty without metrics.
        stops: Tokens that end an answer, beside those of model and tokenizer.
        accelerator: Of this process.
    """
    began = time.perf_counter()
    loss, targets, answers = _loss_and_answers(objective, plan, items, stops, accelerator)
    numbers: dict[str, Any] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "target_tokens": targets}
    scores = None
    if items:
        scores = score(plan.recipe.evaluation.metrics, answers, [item.reference for item in items])
        numbers["metrics"] = scores.metrics
        if scores.classes is not None:
            numbers["classes"] = {"labels": list(scores.classes.labels), "confusion": scores.classes.confusion}
    numbers["seconds"] = time.perf_counter() - began
    return Measured(numbers, answers, scores)


def _loss_and_answers(
    objective: Objective, plan: Plan, items: Sequence[GenerationItem], stops: Sequence[int], accelerator: Accelerator
) -> tuple[float, int, list[Answer]]:
    assert plan.splits.eval is not None
    together = plan.context.dtype == torch.float32
    examples = _examples_of(items, plan) if together else {}
    rows = [Row(item.prompt_ids.tolist(), examples.get(i, (0, None))[1]) for i, item in enumerate(items)]
    recipe, tokenizer = plan.recipe, plan.tokenizer
    found = _read(objective, recipe, tokenizer, rows, stops) if items else None
    if found is None:
        alone = tuple((index,) for index in range(len(plan.splits.eval.examples)))
        loss, targets = held_out_loss(objective, plan, accelerator, alone if together else None)
        prompts = [row.prompt for row in rows]
        return loss, targets, answers_of(objective, recipe, tokenizer, prompts, stops, reads=False)
    loss_sum, targets, answers = found
    used = {index for index, _ in examples.values()}
    rest = tuple((index,) for index in range(len(plan.splits.eval.examples)) if index not in used)
    if rest:
        more, count = held_out_loss(objective, plan, accelerator, rest if together else None)
        loss_sum, targets = loss_sum + more * count, targets + count
    return loss_sum / max(1, targets), targets, answers


def answerable(items: Sequence[GenerationItem], recipe: Recipe) -> tuple[list[GenerationItem], int]:
    """The items whose prompt has tokens and leaves room for an answer, and the model's context in tokens."""
    context = context_of_model(configured(recipe.model, recipe.method)) or sys.maxsize
    room = context - recipe.method.virtual_positions - recipe.evaluation.max_new_tokens
    return [item for item in items if 0 < len(item.prompt_ids) <= room], context


def answers_of(
    objective: Objective,
    recipe: Recipe,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    *,
    reads: bool = True,
) -> list[Answer]:
    """Answer prompts greedily.

    Args:
        objective: The model.
        recipe: How answers are generated.
        tokenizer: The model's.
        prompts: Token ids, generation prompt included.
        stops: Tokens that end an answer, beside those of model and tokenizer.
        reads: Whether to try ``ftune.artifacts.one_pass``; False: it was tried in vain.
    """
    rows = [Row(prompt, None) for prompt in prompts]
    found = _read(objective, recipe, tokenizer, rows, stops) if reads and prompts else None
    if found is not None:
        return found[2]
    spec, text = recipe.evaluation, text_stop(recipe, tokenizer)
    answers = greedy(
        objective.model.eval(),
        tokenizer,
        prompts,
        dtype=objective.dtype,
        batch_size=spec.batch_size,
        max_new_tokens=spec.max_new_tokens,
        stops=stops,
        equal_lengths=_padding_shows(recipe, max(map(len, prompts), default=0)),
    )
    return [until(answer, text) for answer in answers]


def _read(
    objective: Objective, recipe: Recipe, tokenizer: Any, rows: Sequence[Row], stops: Sequence[int]
) -> tuple[float, int, list[Answer]] | None:
    if recipe.method.virtual_positions:
        return None  # its own keys and values stand in front
    spec, ends = recipe.evaluation, end_token_ids(objective.model, tokenizer, stops)
    text = text_stop(recipe, tokenizer)
    found = read_and_answer(
        objective,
        tokenizer,
        rows,
        ends=ends,
        batch_size=spec.batch_size,
        max_new_tokens=spec.max_new_tokens,
        ended=lambda tokens: text is not None and text in tokenizer.decode(tokens),
    )
    if found is None:
        return None
    answers = [until(answer, text) for answer in decoded(found.written, tokenizer, ends)]
    return found.loss_sum, found.targets, answers


def _examples_of(items: Sequence[GenerationItem], plan: Plan) -> dict[int, tuple[int, Any]]:
    """For each item the held-out example, by index, that begins with its prompt and goes on."""
    assert plan.splits.eval is not None
    of_row: dict[int, list[int]] = {}
    examples = plan.splits.eval.examples
    for index, example in enumerate(examples):
        of_row.setdefault(example.row, []).append(index)
    found: dict[int, tuple[int, Any]] = {}
    for i, item in enumerate(items):
        length = len(item.prompt_ids)
        for index in of_row.get(item.row, ()):
            example = examples[index]
            if len(example) > length > 0 and np.array_equal(example.input_ids[:length], item.prompt_ids):
                found[i] = index, example
                break
    return found


def _padding_shows(recipe: Recipe, longest: int) -> bool:
    """Whether padding changes answers: it stands behind the virtual tokens, and a short window counts it.

    The window of a short prompt would end in the padding, before it comes to the virtual tokens.
    """
    ahead = recipe.method.virtual_positions
    if not ahead:
        return False
    shape = read_shape(configured(recipe.model, recipe.method), trust_remote_code=recipe.model.trust_remote_code)
    window = shape.extra["sliding_window"]
    if window is None:
        return False
    return bool(ahead + longest + recipe.evaluation.max_new_tokens > window)
