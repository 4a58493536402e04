"""How much memory there is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["available_bytes", "least_of_all", "on_empty_gpu"]

SLACK = 0.03
"""Share of a GPU's free memory that is left alone: the allocator cuts blocks for what is freed into pieces."""

CONTEXT_BYTES = 960 * 2**20
"""What of a GPU's total, as ``nvidia-smi`` gives it, the driver and a process's context take (on an H100)."""


def available_bytes(
    device_type: str,
    *,
    processes: int = 1,
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    cgroup_file: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes that this process may occupy in all, what it already holds included.

    On the CPU the smaller of what the system has left and what the process's control groups (containers,
    batch systems) leave; on CUDA most of what the current device has left.

    Args:
        device_type: ``cpu`` or ``cuda``.
        processes: Processes of the run on this machine, which share what the CPU has left.
        cgroup_root: Where the control groups' files are mounted.
        cgroup_file: Which names the process's own groups.
    """
    if device_type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info()
        return int(free * (1 - SLACK)) + torch.cuda.memory_reserved()
    import psutil

    left = int(psutil.virtual_memory().available)
    limit = _cgroup_left(cgroup_root, cgroup_file)
    return (left if limit is None else min(left, limit)) // processes + int(psutil.Process().memory_info().rss)


def on_empty_gpu(total: int) -> int:
    """Bytes that a process may occupy on a GPU of so many bytes that nothing else is on."""
    return max(0, int((total - CONTEXT_BYTES) * (1 - SLACK)))


def least_of_all(amount: int, device: torch.device) -> int:
    """The least of what each process of a run says, where there are several; all of them must ask.

    Args:
        amount: This process's.
        device: Where its messages lie.
    """
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return amount
    least = torch.tensor(amount, dtype=torch.int64, device=device)
    distributed.all_reduce(least, op=distributed.ReduceOp.MIN)
    return int(least)


def _cgroup_left(root: Path, own: Path) -> int | None:
    """The least that any of the process's control groups has left, or None where none is limited."""
    left: list[int] = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, usage, cache = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage, cache = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # a limit of any ancestor binds; inside a container the own path may not exist under the mount
        directory = base / group.lstrip("/")
        for place in [directory, *directory.parents]:
            if base != place and base not in place.parents:
                break
            remaining = _group_left(place, limit, usage, cache)
            if remaining is not None:
                left.append(remaining)
    return min(left, default=None)


def _group_left(place: Path, limit: str, usage: str, cache: str) -> int | None:
    """What one control group has left: its limit, less its usage but for cached files it can drop."""
    try:
        allowed = (place / limit).read_text().strip()
        if allowed == "max":
            return None
        used = int((place / usage).read_text())
        statistics = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
        return max(0, int(allowed) - used + int(statistics.get(cache, 0)))
    except (OSError, ValueError):
        return None
