"""Which kernels of norms, SwiGLU and rotary positions are in force: eager ones (``ftune.ops.eager``), or fused ones.

``plain`` is what a process uses unless told otherwise (on CUDA ``ftune.ops.fused``), and any set is in force inside
``using``. A module of autograd that begins with one set ends with it:
``ftune.ops.recompute`` keeps the set of the forward pass for the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch

from ftune.ops.eager import EAGER, Kernels

__all__ = [
    "TRIAL_TOKENS",
    "current",
    "has_fused",
    "plain",
    "refuse_fused",
    "using",
    "why_not_fused",
]

TRIAL_TOKENS = 36
"""Tokens of a forward pass that tries a model out before a run, the same in every trial: in 16 bits on a CPU oneDNN
keeps a kernel of over half a MiB for each product of each number of tokens."""

# Not a context variable: blocks that are recomputed run forwards in autograd's own thread.
_current: Kernels | None = None


_refused: str | None = None


def refuse_fused(why: str) -> None:
    """From now on this process goes without the kernels of ``ftune.ops.fused``."""
    global _refused
    _refused = why


def why_not_fused() -> str | None:
    """Why the kernels of ``ftune.ops.fused`` are not used; None where they are. Takes a second, once."""
    return _refused or _trial()


@functools.cache
def _trial() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        from ftune.ops.fused import works

        return None if works() else "they compute something else here"
    except Exception as error:  # of triton's import, of its compiler, of the driver: each has its own
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def has_fused() -> bool:
    """Whether the kernels of ``ftune.ops.fused`` are there and compute what the eager ones do."""
    return why_not_fused() is None


def plain() -> Kernels:
    """The set of a run: fused on CUDA where that works, else eager."""
    if not has_fused():
        return EAGER
    from ftune.ops.fused import FUSED

    return FUSED


def current() -> Kernels:
    """The set in force."""
    return plain() if _current is None else _current


@contextlib.contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """Put a set in force in every thread, and the one before it back at the end."""
    global _current
    before = _current
    _current = kernels
    try:
        yield
    finally:
        _current = before
