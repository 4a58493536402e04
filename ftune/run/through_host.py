"""A model that is too large for one device, read into the host's memory before it is shared out.

Every process maps the same files, and the device takes one block at a time: to try the model out, and then its part
of each. Only ``torch.distributed.fsdp.fully_shard`` does without more; see ``ftune.run.engines.fsdp2``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ftune.plan.recompute import blocks_of

__all__ = ["block_by_block", "move_beside_base"]


@contextmanager
def block_by_block(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model in the host's memory compute on a device, forward only: each block is there for its own turn.

    What is outside the blocks (embeddings, the last norm, the head) is there from the start and stays: it is used
    again and again. Parameters stay the same objects. What blocks changed of themselves would be lost.

    Args:
        model: On the CPU.
        device: Where the inputs are.
    """
    blocks = blocks_of(model)
    inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
    _move([tensor for tensor in _tensors(model) if id(tensor) not in inside], device)
    on_host: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def come(block: nn.Module, _: Any) -> None:
        on_host[block] = [(tensor, tensor.data) for tensor in _tensors(block)]
        _move(_tensors(block), device)

    def leave(block: nn.Module, *_: Any) -> None:
        for tensor, data in on_host.pop(block, []):
            _put(tensor, data)

    hooks = [block.register_forward_pre_hook(come, prepend=True) for block in blocks]
    hooks += [block.register_forward_hook(leave, always_call=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def move_beside_base(model: nn.Module, device: torch.device, *, trained: bool) -> None:
    """Move what an engine that shares out the base leaves whole: buffers, and what trains beside a frozen base.

    Args:
        model: On the CPU, or partly.
        device: Where it trains.
        trained: Whether the trained parameters are such, adapters; a whole model's are shared out too.
    """
    _move(model.buffers(), device)
    if trained:
        _move((parameter for parameter in model.parameters() if parameter.requires_grad), device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        _put(tensor, tensor.data.to(device))


def _put(tensor: Tensor, data: Tensor) -> None:
    tensor.data = data
