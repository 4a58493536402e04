"""Tensors of which each process holds a part (``torch.distributed.tensor.DTensor``), and the same made whole."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["is_sharded", "local", "part_like", "whole"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold a part only."""
    # Asked without importing torch.distributed.tensor: a run in one process never needs it.
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with ``tensor``; the tensor itself where it is whole."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full, the same on every process; the tensor itself where it is whole already.

    All processes must ask, and in the same order.
    """
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def part_like(full: Tensor, sharded: Tensor) -> Tensor:
    """Share out ``full``, which every process has, as ``sharded`` is: same shape, nothing travels."""
    if not is_sharded(sharded):
        return full
    from torch.distributed.tensor import distribute_tensor

    like: Any = sharded
    assert full.shape == like.shape
    with torch.no_grad():
        return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
