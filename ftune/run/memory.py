"""Peak memory of this process since a moment."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ftune.plan.recompute import blocks_of

__all__ = ["PeakMeter", "map_large_blocks", "return_free_memory", "trim_between_blocks"]

_M_MMAP_THRESHOLD = -3  # malloc.h

TRIM_EVERY = 3
"""Recomputed blocks between two returns of the heap's free places, which take some 6 ms each beside a 135M model."""


def return_free_memory() -> None:
    """Give what the C library's heap holds free back to the system, where that library is glibc.

    After loading it is much: quantized or cast weights lie between the free places of those they were made of, which
    would count to the run's resident size until its end.
    """
    gc.collect()
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def map_large_blocks() -> None:
    """Let glibc map every block from 1 MiB on into a place of its own, which is gone once the block is freed.

    Left to itself the library raises that size to 32 MiB as such blocks are freed. What is gathered and dropped in
    every layer then leaves holes in the heap: with 269M parameters shared among two processes, a fifth of the peak.
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def trim_between_blocks(model: nn.Module) -> None:
    """Let every third recomputed block of a model on the CPU begin with giving the heap's free places back.

    A recomputed block takes and frees its activations among what stays, and the heap grows by what does not fit the
    places left: LoRA on 2,048 tokens of SmolLM2-135M took 1,256 to 1,297 MiB without, takes 1,138 to 1,162 with it, and
    a few percent more time. Who recomputes wants memory, and the plan can foretell it.

    Args:
        model: With recomputation already set up.
    """
    trim = _of_glibc("malloc_trim")
    if trim is None:
        return

    def give_back(block: nn.Module, _: object) -> None:
        if block.training:
            trim(0)

    recomputed = [block for block in blocks_of(model) if block.gradient_checkpointing]
    for block in recomputed[::TRIM_EVERY]:
        block.register_forward_pre_hook(give_back)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where that is another one."""
    if sys.platform != "linux":
        return None
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return found


class PeakMeter:
    """Measure the peak since the meter was made: allocated bytes on CUDA, resident bytes elsewhere.

    What loading left free is returned first. On Linux the kernel's high-water mark is reset, so loading does not
    count; where that is not allowed, and on other systems, the peak of the whole process is given.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        return_free_memory()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def peak_bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
