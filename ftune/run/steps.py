"""What follows from the number of an update alone: its rows, its learning rate, its random numbers, and what is due.

Nothing here depends on what happened before; so a resumed run equals an uninterrupted one, and no random state is
stored.
"""

from __future__ import annotations

import hashlib

import torch
from torch.optim import Optimizer

from ftune.data.batches import epoch_order
from ftune.ops.lr import lr_scale
from ftune.plan.plan import Plan

__all__ = ["RowOrder", "due", "reseed", "set_learning_rates"]


class RowOrder:
    """Which rows each update takes.

    Args:
        plan: The rows, how many an update takes, and the seed.
        by_length: Whether rows of like lengths come together.
    """

    def __init__(self, plan: Plan, by_length: bool) -> None:
        self._plan, self._by_length = plan, by_length
        self._lengths = plan.row_lengths
        self._epoch = -1
        self._order: list[list[int]] = []

    def of(self, step: int) -> list[int]:
        """The rows of the update that follows ``step`` others."""
        plan = self._plan
        epoch, index = divmod(step, plan.steps_per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(
                self._lengths, plan.global_batch, plan.recipe.training.seed, epoch, group_by_length=self._by_length
            )
            self._epoch = epoch
        return self._order[index]


def set_learning_rates(optimizer: Optimizer, step: int, plan: Plan) -> None:
    """Give every group the learning rate of the update that follows ``step`` others."""
    schedule = plan.recipe.schedule
    scale = lr_scale(step, plan.total_steps, plan.warmup_steps, schedule.name, schedule.min_lr_ratio)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale


def reseed(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make dropout a function of (seed, step, micro-step, rank)."""
    where = f"{seed}/{step}/{micro_step}/{rank}"
    torch.manual_seed(int.from_bytes(hashlib.blake2b(where.encode(), digest_size=7).digest()))


def due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many updates is due behind this one; None: it never is."""
    return every is not None and step % every == 0
