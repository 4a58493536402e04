"""Rows of a plan as the tensors of a micro-batch, and what is counted and told of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftune.data.batches import collate, length_step
from ftune.methods.documents import room_for
from ftune.plan.plan import Plan

if TYPE_CHECKING:
    from ftune.data.batches import Batch
    from ftune.data.tokenize import Example

__all__ = ["count_tokens", "make_batch", "micro_batch", "row_numbers", "shape_of"]


def micro_batch(plan: Plan, rows: list[int], flat: bool) -> Batch:
    """Rows of the training split as one batch, on the CPU; flat: behind each other, without padding."""
    examples = plan.splits.train.examples
    return make_batch([[examples[i] for i in plan.rows[row]] for row in rows], plan, flat)


def make_batch(rows: list[list[Example]], plan: Plan, flat: bool = False) -> Batch:
    """Collate rows of documents; flat, or for flash attention, all documents become one row, without padding.

    transformers finds the borders of documents for flash attention only in a batch of one row; in more rows it
    would attend across them.
    """
    if flat or (plan.recipe.packing and plan.recipe.model.attention.startswith("flash")):
        rows = [[document for row in rows for document in row]]
    longest = max((sum(map(len, row)) for row in rows), default=1)
    # Any token serves. That for padding may have an embedding of zeros, of which some architectures (gemma3n) take a
    # root, whose gradient is none.
    padding = next((int(example.input_ids[0]) for row in rows for example in row), plan.tokenizer.pad_token_id)
    return collate(rows, padding, multiple_of=length_step(longest))


def shape_of(batch: Batch) -> tuple[int, ...]:
    """What decides the shapes of a model's tensors: rows, their length, and room for so many documents in them."""
    # Padding is a document of its own.
    documents = len(batch.rows) + (batch.tokens < batch.input_ids.numel())
    return *batch.input_ids.shape, 0 if batch.position_ids is None else room_for(documents)


def count_tokens(plan: Plan, rows: list[int]) -> tuple[int, int]:
    """Real tokens and target tokens of an update; every process knows all rows, so none has to ask."""
    examples = [plan.splits.train.examples[i] for row in rows for i in plan.rows[row]]
    return sum(len(e.input_ids) for e in examples), sum(e.target_tokens for e in examples)


def row_numbers(plan: Plan, rows: list[int]) -> list[int]:
    """Where an update's rows stand in the user's data: the first twenty."""
    examples = plan.splits.train.examples
    return sorted({examples[i].row for row in rows for i in plan.rows[row]})[:20]
