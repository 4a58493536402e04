"""Going on where memory runs out: without recorded CUDA graphs, then in smaller micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.optim import Optimizer

from ftune.run.events import Event, Halved
from ftune.run.memory import return_free_memory
from ftune.run.out_of_memory import is_out_of_memory
from ftune.run.portions import Portions
from ftune.run.replay import Replay

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

__all__ = ["Recovery"]

T = TypeVar("T")


@dataclass(frozen=True)
class Recovery:
    """Makes what ran out of memory anew, where that can help.

    Attributes:
        accelerator: Knows the device and the other processes.
        optimizer: Whose parameters' gradients are dropped before an update is made anew.
        portions: How the rows of an update are split.
        progress: Where it is kept how often micro-batches were halved (``halvings``), for the updates to come.
        emit: Called when micro-batches are halved.
        auto_batch: Whether to halve them.
        replay: Whose graphs take memory; None: there are none.
    """

    accelerator: Accelerator
    optimizer: Optimizer
    portions: Portions
    progress: dict[str, Any]
    emit: Callable[[Event], None]
    auto_batch: bool
    replay: Replay | None

    def gradients(self, step: int, rows: list[int], backward: Callable[[list[list[int]]], Tensor]) -> Tensor:
        """Make the gradients of an update, anew where memory runs out.

        Where ``auto_batch`` allows it, every process makes the update anew, and those to come, in smaller
        micro-batches.

        Args:
            step: Updates made so far.
            rows: Of the whole update.
            backward: Adds up the gradients of this process's micro-batches, and returns the sum of their losses.

        Returns:
            What ``backward`` did.
        """
        rank = self.accelerator.process_index
        while True:
            halvings = self.progress.get("halvings", 0)
            mine, total, failure = self.portions.of(rows, rank, halvings), None, None
            try:
                total = backward(mine)
            except Exception as error:
                if not (is_out_of_memory(error) and (self.auto_batch or self._has_graphs)):
                    raise
                failure = error.with_traceback(None)  # which holds the activations
            if failure is not None:
                freed = self._let_graphs_go()
                self._drop_gradients()  # before asking the others, which takes memory too
                if freed:
                    continue
            short = self._ranks_where(failure is not None) if self.auto_batch else []
            if total is not None and not short:
                return total
            if any(self.portions.smallest(rows, each, halvings) for each in short):
                raise failure or MemoryError(f"process {short[0]} ran out of memory")
            if failure is None:
                self._drop_gradients()
            self.progress["halvings"] = self.portions.halved(rows, short, halvings)
            before, now = (len(self.portions.of(rows, short[0], n)) for n in (halvings, self.progress["halvings"]))
            self.emit(Halved(step, self.progress["halvings"], before, now))

    def without_graphs(self, measure: Callable[[], T]) -> T:
        """What ``measure`` returns; where graphs of training are in the way of it, without them."""
        try:
            return measure()
        except Exception as error:
            if not (is_out_of_memory(error) and self._has_graphs):
                raise
        self._let_graphs_go()
        return measure()

    @property
    def _has_graphs(self) -> bool:
        return self.replay is not None and self.replay.has_graphs

    def _let_graphs_go(self) -> bool:
        """Free the memory of graphs; whether there were any."""
        if self.replay is None or not self.replay.has_graphs:
            return False
        self.replay.release("memory ran out beside them")
        return True

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        return_free_memory()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()

    def _ranks_where(self, here: bool) -> list[int]:
        """The processes that say so; all of them must ask."""
        if self.portions.plan.world_size == 1:
            return [0] if here else []
        flags = self.accelerator.gather(torch.tensor([int(here)], device=self.accelerator.device))
        return [int(rank) for rank in flags.nonzero().flatten()]
