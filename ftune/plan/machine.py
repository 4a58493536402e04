"""The machine that trains, as a value: a plan for another machine is the same call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftune.available import available_bytes, least_of_all, on_empty_gpu
from ftune.plan import precision
from ftune.plan.base_model import choose_device

if TYPE_CHECKING:
    import torch

    from ftune.plan.devices import Device

__all__ = ["ON_PAPER", "Machine"]

ON_PAPER = 0.65
"""What matmuls reach of the operations a second that a GPU's data sheet names."""


@dataclass(frozen=True)
class Machine:
    """What a plan asks of the machine.

    Attributes:
        device: Where the model computes.
        name: What it is called.
        available: Bytes that this process may occupy there, what it holds included; the least of all processes.
        bfloat16: Whether ``dtype: auto`` takes it.
        flops: Floating-point operations a second of matmuls, by dtype (``float32``, ``bfloat16``); 0 where torch
            cannot, empty where nothing is known.
        fused_loss: Whether a kernel computes the loss on CUDA (``ftune.ops.fused``).
        measured: Whether this is the machine here; else its figures are those of a data sheet.
    """

    device: torch.device
    name: str
    available: int
    bfloat16: bool
    flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    fused_loss: bool = True
    measured: bool = True

    @classmethod
    def here(cls) -> Machine:
        """The machine that this process runs on. In a group of processes all must call it, and agree.

        The speed of matmuls is measured once a machine and kept (``ftune.plan.precision``).
        """
        from ftune.ops.kernels import has_fused

        device = choose_device()
        on_cpu = device.type == "cpu"
        # The processes of a run on one machine share what its CPU has left.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_cpu else 1
        return cls(
            device=device,
            name=_device_name(device),
            available=least_of_all(available_bytes(device.type, processes=processes), device),
            bfloat16=precision.takes_bfloat16(device),
            flops=precision.matmul_speeds(device),
            fused_loss=on_cpu or has_fused(),
        )

    @classmethod
    def of(cls, device: Device) -> Machine:
        """A machine with a CUDA device that is not here, and nothing else on it."""
        import torch

        return cls(
            device=torch.device("cuda"),
            name=device.name,
            available=on_empty_gpu(device.memory),
            bfloat16=device.bfloat16,
            flops={dtype: speed * ON_PAPER for dtype, speed in device.flops.items()},
            measured=False,
        )

    def dtype(self, name: str) -> torch.dtype:
        """The dtype to compute in: as the recipe says, or with ``auto`` what is faster."""
        return precision.choose_dtype(name, self.device, self.bfloat16)


def _device_name(device: torch.device) -> str:
    import platform

    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
