"""Allocators as training wants them: the C library's on a CPU, of which a process is told before it begins; PyTorch's.

PyTorch asks for blocks aligned to 64 bytes. glibc cuts each out of a larger one and keeps the two scraps, of up to a
hundred bytes, in the lists that it serves small requests from. There they are not joined with the block again once that
is freed, so the next tensor of the same size does not fit the place that the last one left, and the heap grows around
holes. Without those lists (the thread's cache and the "fast bins") scraps and blocks become one place again:
SmolLM2-135M trains in 85 to 120 MiB less of 1,300 to 1,550, no slower. docs/design/log.md has the figures.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["begin_again", "expand_segments", "tuned"]

_VARIABLE = "GLIBC_TUNABLES"
_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_OF_TORCH = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_GPUS = ("/dev/nvidiactl", "/dev/kfd")


def tuned(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment of a process that trains on a CPU; None where there is nothing to change in it.

    That is: where the C library is not glibc, where the user brought another allocator (``LD_PRELOAD``) or settings of
    this one, and beside a GPU, which does the work while the heap serves only what starts it.
    """
    found = environment.get(_VARIABLE, "")
    if not _is_glibc() or "LD_PRELOAD" in environment or "glibc.malloc" in found or any(map(os.path.exists, _GPUS)):
        return None
    return {**environment, _VARIABLE: f"{found}:{_TUNABLES}" if found else _TUNABLES}


def expand_segments() -> None:
    """Have PyTorch's allocator on a GPU let its segments grow: rows of many lengths would cut memory into pieces.

    Read when the first tensor goes there; later it has no effect. What the user says of the allocator stays.
    """
    if not any(name in os.environ for name in _OF_TORCH):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def begin_again() -> None:
    """Replace this process by the same command in the environment of ``tuned``; returns where there is none.

    Only of a process that was started as ``ftune ...`` or ``python -m ftune ...``: who calls the command line from a
    program of their own has done other things before, which must not be done twice.
    """
    arguments = sys.argv[1:]
    ours = Path(sys.argv[0]).name in ("ftune", "__main__.py") and sys.orig_argv[-len(arguments) :] == arguments
    if not (arguments and ours and sys.executable):
        return
    environment = tuned(os.environ)
    if environment is not None:
        with contextlib.suppress(OSError):  # then the same run in more memory
            os.execve(sys.executable, sys.orig_argv, environment)


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:  # a C library that does not know the name
        return False
