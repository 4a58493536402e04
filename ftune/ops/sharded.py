"""Tensors of which each process holds a part, and the same made whole.

A part is a ``torch.distributed.tensor.DTensor`` under FSDP2, and under DeepSpeed's ZeRO-3 a parameter that is empty
until it is gathered, with its part in ``ds_tensor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["is_sharded", "local", "part_like", "whole", "whole_while"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold a part only."""
    # Asked without importing torch.distributed.tensor: a run in one process never needs it.
    return hasattr(tensor, "full_tensor") or _of_zero3(tensor)


def _of_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with ``tensor``; the tensor itself where it is whole."""
    if _of_zero3(tensor):
        return cast(Tensor, cast(Any, tensor).ds_tensor)
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full, the same on every process; the tensor itself where it is whole already.

    All processes must ask, and in the same order. Of ZeRO-3 it is a copy, and has no graph.
    """
    if _of_zero3(tensor):
        with whole_while([tensor]):
            return tensor.detach().clone()
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def whole_while(parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """A context in which parameters of ZeRO-3 are whole, all at once; they are not to be changed in it."""
    from deepspeed.runtime.zero import GatheredParameters

    return cast(AbstractContextManager[Any], GatheredParameters(list(parameters)))


def part_like(full: Tensor, sharded: Tensor) -> Tensor:
    """Share out ``full``, which every process has, as ``sharded`` is: same shape, nothing travels."""
    if not is_sharded(sharded):
        return full
    from torch.distributed.tensor import distribute_tensor

    like: Any = sharded
    assert full.shape == like.shape
    with torch.no_grad():
        part = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
        return part.to(like.to_local().device)  # the host's, where parts are offloaded
