"""In what portions a process computes an update, and in which smaller ones where memory runs out.

Every process knows the portions of all: they follow from the rows, and nothing has to be asked.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftune.data.batches import deal, regroup, split

if TYPE_CHECKING:
    from ftune.plan.plan import Plan

__all__ = ["Portions"]


@dataclass(frozen=True)
class Portions:
    """How the rows of an update are split.

    Attributes:
        plan: Sizes, and the number of processes.
        flat: Whether the rows of a micro-batch are laid behind each other, without padding.
        lockstep: Whether every process must compute as many micro-batches as the others.
    """

    plan: Plan
    flat: bool
    lockstep: bool

    def of(self, rows: list[int], rank: int, halvings: int) -> list[list[int]]:
        """One process's rows of an update, in portions that are computed at once.

        Args:
            rows: Of the whole update.
            rank: The process.
            halvings: How often the portions were halved.
        """
        world = self.plan.world_size
        if self.flat:
            if not self.lockstep:
                return self._flat(rows, rank, halvings)
            each = [self._flat(rows, other, halvings) for other in range(world)]
            return each[rank] + [[] for _ in range(max(map(len, each)) - len(each[rank]))]
        size = max(1, self.plan.recipe.training.micro_batch_size >> halvings)
        mine = split(rows, size, math.ceil(self.plan.global_batch / (size * world)), rank, world)
        # Without rows, other processes would still wait for the exchange of gradients.
        return mine if world > 1 else [micro for micro in mine if micro]

    def _flat(self, rows: list[int], rank: int, halvings: int) -> list[list[int]]:
        lengths, capacity = self.plan.row_lengths, self.plan.micro_batch_tokens >> halvings
        return regroup(deal(rows, lengths, rank, self.plan.world_size), lengths, capacity)

    def smallest(self, rows: list[int], rank: int, halvings: int) -> bool:
        """Whether a process computes one row at a time already, so that no portion can be halved."""
        return max(map(len, self.of(rows, rank, halvings))) <= 1

    def halved(self, rows: list[int], ranks: Collection[int], halvings: int) -> int:
        """The fewest halvings with which each of some processes computes other portions; none is at its smallest."""
        now = {rank: self.of(rows, rank, halvings) for rank in ranks}
        while any(self.of(rows, rank, halvings) == portions for rank, portions in now.items()):
            halvings += 1
        return halvings
