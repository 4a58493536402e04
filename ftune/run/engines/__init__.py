"""Engines: how several processes share one update. The loop speaks to all of them through ``Engine``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftune.run.engines.base import Ddp, Engine, Gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftune.plan.engine import EngineChoice

__all__ = ["Ddp", "Engine", "Gathered", "make_engine"]


def make_engine(choice: EngineChoice, accelerator: Accelerator, *, auto_batch: bool = False) -> Engine:
    """The engine that was chosen (``ftune.plan.engine``); one process alone needs none, and gets ``Ddp``.

    auto_batch: Whether an update may be made anew, so that no process may wait for another while it is made.
    """
    if choice.name.startswith("fsdp2"):
        from ftune.run.engines.fsdp2 import Fsdp2

        assert not auto_batch
        return Fsdp2(choice, accelerator)
    if choice.zero_stage:
        from ftune.run.engines.deepspeed import DeepSpeed

        assert not auto_batch
        return DeepSpeed(choice, accelerator)
    return Ddp(accelerator, at_end=auto_batch)
