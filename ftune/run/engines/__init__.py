"""Engines: how several processes share one update. The loop speaks to all of them through ``Engine``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftune.run.engines.base import Ddp, Engine, Gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftune.plan.engine import EngineChoice

__all__ = ["Ddp", "Engine", "Gathered", "make_engine"]


def make_engine(choice: EngineChoice, accelerator: Accelerator) -> Engine:
    """The engine that was chosen (``ftune.plan.engine``); one process alone needs none, and gets ``Ddp``."""
    if choice.name.startswith("fsdp2"):
        from ftune.run.engines.fsdp2 import Fsdp2

        return Fsdp2(choice, accelerator)
    if choice.zero_stage:
        from ftune.run.engines.deepspeed import DeepSpeed

        return DeepSpeed(choice, accelerator)
    return Ddp(accelerator)
