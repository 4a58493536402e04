"""Peak memory of this process since a moment."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

__all__ = ["PeakMeter", "map_large_blocks", "return_free_memory"]

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_free_memory() -> None:
    """Give what the C library's heap holds free back to the system, where that library is glibc.

    After loading it is much: quantized or cast weights lie between the free places of those they were made of, which
    would count to the run's resident size until its end.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def map_large_blocks() -> None:
    """Let glibc map every block from 1 MiB on into a place of its own, which is gone once the block is freed.

    Left to itself the library raises that size to 32 MiB as such blocks are freed. What is gathered and dropped in
    every layer then leaves holes in the heap: with 269M parameters shared among two processes, a fifth of the peak.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


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
