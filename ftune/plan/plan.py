"""The plan: everything that is decided before the weights are loaded, as one frozen value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ftune.data.packing import pack
from ftune.data.splits import Split, Splits
from ftune.memory.advice import certain
from ftune.memory.estimate import MemoryEstimate
from ftune.methods import Context, ModelShape
from ftune.plan.defaults import Choice
from ftune.plan.engine import DDP, EngineChoice
from ftune.plan.fingerprint import Text
from ftune.plan.machine import Machine
from ftune.plan.recompute import Recomputed
from ftune.recipe.schema import Recipe, TrainingSpec

__all__ = ["Plan", "Rows", "budget_of", "make_rows", "row_lengths", "tokens_at_once"]

Rows = tuple[tuple[int, ...], ...]
"""Rows of a split: each the indices of the examples that share it."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the weights are loaded.

    Attributes:
        recipe: The recipe with everything derived written out (dtype, epochs, learning rate, packing, alpha).
        tokenizer: The model's tokenizer, with the recipe's chat template.
        splits: Tokenized training and held-out examples.
        rows: Training rows; one example each without packing.
        eval_rows: Held-out rows, likewise.
        world_size: Processes that share an update.
        steps_per_epoch: Updates in one pass over the rows.
        total_steps: Updates in the run.
        warmup_steps: Updates before the peak learning rate.
        shape: The base model's sizes.
        context: What the method may know.
        machine: What was planned for.
        memory: Predicted bytes, itemised.
        recomputed: Which blocks are recomputed in the backward pass, and why.
        may_lie_flat: Whether the rows of a micro-batch may be concatenated into one, as far as sizes tell; whether this
            architecture keeps documents apart is tried once the model is there.
        sizes: Where the sizes came from, when they are not those of the recipe's model.
        engine: How the processes share an update.
        choices: Training settings that the recipe left out, and why they are what they are.
        slower: What the recipe asks for by name and the device is much slower in, a warning each.
        notes: What to tell of the base model's files.
        fingerprint: Of the base model's files, where they are on this disk.
        text: Digests of its tokenizer and of the chat template.
    """

    recipe: Recipe
    tokenizer: Any
    splits: Splits
    rows: Rows
    eval_rows: Rows
    world_size: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    shape: ModelShape
    context: Context
    machine: Machine
    memory: MemoryEstimate
    recomputed: Recomputed
    may_lie_flat: bool
    sizes: Path | None = None
    engine: EngineChoice = DDP
    choices: tuple[Choice, ...] = ()
    slower: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: str | None = None
    text: Text = Text(None, None)

    @property
    def global_batch(self) -> int:
        """Rows in one optimizer update, over all processes."""
        training = self.recipe.training
        return training.micro_batch_size * training.accumulation * self.world_size

    @property
    def budget(self) -> int:
        """Bytes that the run may take: what the recipe says, or what the device has free."""
        return budget_of(self.recipe, self.machine)

    @property
    def through_host(self) -> bool:
        """Whether the base is read into the host's memory, and the device takes a block at a time: not all fits there.

        For ``fully_shard``, which shares out what it is given block by block; quantized weights are made on the device.
        """
        too_large = self.memory.loading > self.budget
        return too_large and self.engine.name.startswith("fsdp2") and self.recipe.method.base_quantization is None

    @property
    def fits(self) -> bool:
        """Whether the budget is enough, for training and before it for loading."""
        return self.memory.total <= self.budget and (self.through_host or self.memory.loading <= self.budget)

    @property
    def tight(self) -> bool:
        """Whether the run fits by less than a predicted peak may be wrong."""
        return self.fits and self.memory.total > certain(self.budget)

    @cached_property
    def row_lengths(self) -> list[int]:
        """Tokens in each training row."""
        return row_lengths(self.splits.train, self.rows)

    @cached_property
    def micro_batch_tokens(self) -> int:
        """Tokens in a forward pass where rows are concatenated; no less than the longest row has."""
        return tokens_at_once(self.recipe.training, self.row_lengths)


def budget_of(recipe: Recipe, machine: Machine) -> int:
    """Bytes that a run may take: what the recipe says, or what the device has free."""
    gib = recipe.training.memory_gib
    return machine.available if gib is None else int(gib * 2**30)


def row_lengths(split: Split, rows: Rows) -> list[int]:
    """Tokens in each row of a split."""
    return [sum(len(split.examples[index].input_ids) for index in row) for row in rows]


def make_rows(split: Split, recipe: Recipe) -> Rows:
    """Share rows between examples where the recipe packs, else give each its own."""
    if not recipe.packing:
        return tuple((index,) for index in range(len(split.examples)))
    lengths = [len(example.input_ids) for example in split.examples]
    return tuple(tuple(row) for row in pack(lengths, recipe.data.max_length))


def tokens_at_once(training: TrainingSpec, lengths: Sequence[int]) -> int:
    """Tokens in a forward pass over concatenated rows of these lengths: no fewer than the longest has."""
    longest = max(lengths)
    return max(training.micro_batch_tokens or training.micro_batch_size * longest, longest)
