"""FSDP2: each process keeps a part of every frozen weight, and of every trained one where whole models train.

A block's weights are gathered when the block computes and dropped behind it; so are those outside the blocks, once an
update. What trains beside a frozen base, an adapter, is small: every process keeps it whole, and its gradients are
averaged as DDP would. So its layers, its optimizer and what it saves never see a part, and every method works as it
does in one process. Of a whole model in training all is shared out: weights, gradients and the moments of AdamW.

Offloaded, the parts lie in the host's memory and are copied to the device when they are gathered; of a whole model in
training AdamW runs on the host. Adapters stay on the device.

Source: torch.distributed.fsdp.fully_shard; ZeRO-3 (Rajbhandari et al., arXiv:1910.02054).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftune.ops.sharded import is_sharded, part_like, whole
from ftune.plan.recompute import blocks_of
from ftune.run.engines.base import Engine, Gathered, average_gradients, put_whole
from ftune.run.memory import map_large_blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftune.methods import Method
    from ftune.plan.engine import EngineChoice
    from ftune.run.objective import Objective

__all__ = ["Fsdp2"]


class Fsdp2(Engine):
    """Fully sharded data parallelism.

    Args:
        choice: ``reshard_after_forward``, ``offload``.
        accelerator: Knows the device; its processes have joined.
    """

    name = "fsdp2"
    lockstep = True

    def __init__(self, choice: EngineChoice, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.choice = choice
        self._root: Any = None

    def wrap(self, objective: Objective, optimizer: Optimizer, method: Method) -> nn.Module:
        """Shard block by block, then what is left; hand the optimizer the parts of what it trains."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        device = self.accelerator.device.type
        if device == "cpu":
            map_large_blocks()
        before = dict(objective.named_parameters())
        kept = {p for p in before.values() if p.requires_grad and method.artifact == "adapter"}
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device, (self.world_size,)),
            "ignored_params": kept,
            # Pinned, so that copies overlap with what computes; without a GPU there is nothing to pin for.
            "offload_policy": CPUOffloadPolicy(pin_memory=device != "cpu") if self.choice.offload else OffloadPolicy(),
        }
        for block in blocks_of(objective.model):
            fully_shard(block, reshard_after_forward=self.choice.reshard_after_forward, **settings)
        # What is outside the blocks is needed again at once: the head by the backward pass, the embedding soon after.
        fully_shard(objective, reshard_after_forward=False, **settings)
        self._root = objective
        after = dict(objective.named_parameters())
        _replace(
            optimizer,
            {before[name]: after[name] for name in before},
            whole_state=self.accelerator.device if method.keeps_whole_state else None,
        )
        return objective

    def exchange(self, trained: Sequence[nn.Parameter]) -> None:
        """Average the gradients of what every process keeps whole; those of parts travelled in the backward pass."""
        kept = [p for p in trained if not is_sharded(p)]
        if kept:
            average_gradients(kept, self.world_size, self.accelerator.device)

    def after_evaluation(self) -> None:
        """Share out again what an evaluation left gathered: used as it is, it would get no gradient."""
        self._root.reshard()

    @torch.no_grad()
    def gather(self, model: nn.Module, optimizer: Optimizer) -> Gathered | None:
        """Parts of all processes put together, one tensor at a time."""
        main = self.accelerator.is_main_process
        self._root.reshard()  # an evaluation leaves what is outside the blocks gathered
        trained = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found = whole(parameter.detach())
                if main:
                    trained[name] = found.cpu().contiguous()
        state = optimizer.state_dict()
        state["state"] = {
            index: {key: self._gathered(value) for key, value in values.items()}
            for index, values in state["state"].items()
        }
        return Gathered(trained, state) if main else None

    def _gathered(self, value: Any) -> Any:
        """A value of the optimizer's state; on other processes than the main one, nothing to keep."""
        if not isinstance(value, Tensor) or not is_sharded(value):
            return value
        found = whole(value)
        return found.cpu() if self.accelerator.is_main_process else None

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> None:
        """Gather one parameter after another, if it trains; frozen ones are not saved."""
        self._root.reshard()
        put_whole(model, lambda p: p.requires_grad and is_sharded(p), main=self.accelerator.is_main_process)


def _replace(optimizer: Optimizer, by: dict[nn.Parameter, nn.Parameter], *, whole_state: torch.device | None) -> None:
    """Put other parameters in an optimizer's groups, in the same places, and parts into its state.

    whole_state: where a state lies that every process keeps whole; None: it is shared out.
    """
    for group in optimizer.param_groups:
        group["params"] = [by[parameter] for parameter in group["params"]]
        group["fused"] = None  # which would want the counts of steps where the parameters are
    states = {by[cast(nn.Parameter, parameter)]: state for parameter, state in optimizer.state.items()}
    optimizer.state.clear()
    for parameter, state in states.items():
        optimizer.state[cast(Tensor, parameter)] = {
            key: _for_part(value, parameter, whole_state) for key, value in state.items()
        }


def _for_part(value: Any, parameter: Tensor, whole_state: torch.device | None) -> Any:
    """A value of the state of what is a part now."""
    if not isinstance(value, Tensor):
        return value
    if not value.dim():
        return value.cpu()  # a count of steps
    if whole_state is not None:
        return value.to(whole_state)
    return part_like(value, parameter) if value.shape == parameter.shape else value
