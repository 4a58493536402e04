"""DeepSpeed: ZeRO-2 shares out gradients and AdamW's moments among processes, ZeRO-3 every weight too.

DeepSpeed takes the backward pass and the update from the loop: it keeps gradients and moments in flat parts, clips
them itself, and runs AdamW on its part. What the loop and a method ask of gradients goes through this engine.
Checkpoints are whole and have the same files as from any other engine, so they do not come from DeepSpeed's own.

Source: ZeRO (Rajbhandari et al., arXiv:1910.02054); deepspeed.ai's configuration reference.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftune.memory.sharding import BUCKET, PERSISTENT
from ftune.ops.sharded import is_sharded, whole, whole_while
from ftune.run.engines.base import Engine, Gathered, put_whole
from ftune.run.memory import map_large_blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ftune.methods import Method
    from ftune.plan.engine import EngineChoice
    from ftune.run.objective import Objective

__all__ = ["DeepSpeed"]

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of an element; ``step`` is one number for all."""


class DeepSpeed(Engine):
    """ZeRO-2 and ZeRO-3.

    Args:
        choice: Its name says which.
        accelerator: Knows the device; its processes have joined.
    """

    name = "deepspeed"
    # Gradients travel in every backward pass, weights of ZeRO-3 in every forward pass too.
    lockstep = True
    keeps_gradients: ClassVar[bool] = False

    def __init__(self, choice: EngineChoice, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.stage = choice.zero_stage
        self._engine: Any = None
        self._inner: Any = None

    def wrap(self, objective: Objective, optimizer: Optimizer, method: Method) -> nn.Module:
        """Let DeepSpeed share out the model, and an AdamW of its own with the loop's groups and state."""
        device = self.accelerator.device.type
        deepspeed = _imported(device)
        if device == "cpu":
            map_large_blocks()
        # DeepSpeed puts flat parts in its optimizer's groups; the loop's keeps the model's parameters.
        defaults: dict[str, Any] = optimizer.defaults
        # Not fused, which would want the counts of steps where the parameters are.
        groups = [{**group, "fused": None} for group in optimizer.param_groups]
        self._inner = type(optimizer)(groups, **{key: defaults[key] for key in ("lr", "betas", "eps")})
        state = dict(optimizer.state)
        self._engine, *_ = deepspeed.initialize(model=objective, optimizer=self._inner, config=self._settings(groups))
        self._make_moments(next(iter(state.values()))["step"] if state else torch.zeros(()))
        if state:
            self._restore(optimizer, state)
        return cast(nn.Module, self._engine)

    def _settings(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """DeepSpeed's configuration: fp32 for what trains, as under every engine; the loop counts and clips."""
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": sys.maxsize,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.stage,
                "overlap_comm": False,
                "reduce_bucket_size": min(BUCKET, trained),  # it makes a buffer of that size
                "allgather_bucket_size": BUCKET,
                "stage3_prefetch_bucket_size": BUCKET,
                "stage3_param_persistence_threshold": PERSISTENT,
                # Dropped behind the block that used it, as under fsdp2.
                "stage3_max_reuse_distance": 0,
                "memory_efficient_linear": False,
            },
        }

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module) -> Iterator[None]:
        """More micro-batches follow: each adds to the parts of the gradients."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def gradient_norm(self, method: Method, trained: Sequence[nn.Parameter], optimizer: Optimizer) -> float:
        """Of the parts that DeepSpeed has reduced, before it updates."""
        zero = self._engine.optimizer
        groups = zero.params_in_partition if self.stage == 2 else zero.fp16_groups
        norms = [float(zero.get_grad_norm_direct(zero.averaged_gradients[i], group)) for i, group in enumerate(groups)]
        # DeepSpeed writes -1 for a norm that is not finite: squared, it would be one of 1.
        return math.hypot(*norms) if min(norms) >= 0 else math.nan

    def update(self, trained: Sequence[nn.Parameter], optimizer: Optimizer, bound: float | None, norm: float) -> None:
        """Clip and step in DeepSpeed, at the loop's learning rates."""
        self._engine.optimizer.clip_grad = bound or 0.0
        for mine, given in zip(self._inner.param_groups, optimizer.param_groups, strict=True):
            mine["lr"] = given["lr"]
        self._engine.step()
        assert not self._engine.optimizer.overflow, "DeepSpeed passed over an update whose gradient norm is finite"
        self._count(optimizer)

    def _count(self, optimizer: Optimizer) -> None:
        """Tell the loop's optimizer how many updates were made of each parameter; the moments stay shared out."""
        for parts, flat in self._flat():
            for parameter in parts:
                optimizer.state[cast(Tensor, parameter)] = {"step": self._inner.state[flat]["step"]}

    def _flat(self) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
        """Each flat part of this process, with the parameters that it is made of."""
        zero = self._engine.optimizer
        if self.stage == 2:
            return zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        return zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)

    def _make_moments(self, step: Tensor) -> None:
        """AdamW's state of every flat part, as it would make it itself.

        DeepSpeed looks for a parameter's moments in the state behind the first update of the first group, where
        those of the others do not exist yet, and does not look again.
        """
        for _, flat in self._flat():
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self._inner.state[flat] = {"step": step.clone(), **moments}
        if self.stage == 2:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, state: dict[Any, dict[str, Any]]) -> None:
        """Share out the moments of a resumed run."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for parameter, values in state.items():
            for key in MOMENTS:
                if self.stage == 2:
                    safe_set_full_optimizer_state(parameter, values[key], key)
                else:
                    safe_set_local_optimizer_state(parameter, self._part(values[key], parameter), key)
        self._count(optimizer)

    def _part(self, full: Tensor, parameter: Any) -> Tensor:
        """This process's part of a whole tensor, as ZeRO-3 cuts one: flat, filled up with zeros at the end."""
        size = parameter.ds_tensor.ds_numel
        padded = full.new_zeros(size * self.world_size)
        padded[: full.numel()] = full.flatten()
        return padded[size * self.accelerator.process_index :][:size]

    @torch.no_grad()
    def gather(self, model: nn.Module, optimizer: Optimizer) -> Gathered | None:
        """Parts of all processes put together, one tensor at a time."""
        from deepspeed.utils import safe_get_full_optimizer_state

        main = self.accelerator.is_main_process
        trained = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found = whole(parameter)
                if main:
                    trained[name] = found.detach().cpu().clone()
        state = optimizer.state_dict()
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for index, values in state["state"].items():
            moments = {key: safe_get_full_optimizer_state(order[index], key) for key in MOMENTS}
            if main:
                shape = trained_shape(order[index])
                state["state"][index] = {
                    "step": values["step"].cpu().clone(),
                    **{key: moment.view(shape).cpu() for key, moment in moments.items()},
                }
        return Gathered(trained, state) if main else None

    def whole_adapters(self, model: nn.Module, method: Method) -> AbstractContextManager[Any]:
        """ZeRO-3: adapters, gathered; a whole model would not fit, and none of its methods looks."""
        if self.stage == 2 or method.artifact == "model":
            return contextlib.nullcontext()
        return whole_while([parameter for parameter in model.parameters() if parameter.requires_grad])

    @torch.no_grad()
    def make_whole(self, model: nn.Module) -> None:
        """Gather one parameter after another, if it trains, and let DeepSpeed go."""
        put_whole(model, lambda p: p.requires_grad, main=self.accelerator.is_main_process)
        self._engine.destroy()


def trained_shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, where this process may hold a part."""
    return tuple(parameter.ds_shape if is_sharded(parameter) else parameter.shape)


def _imported(device: str) -> Any:
    """DeepSpeed, silent on standard output, and without an operator that takes a C++ compiler."""
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed: Any = importlib.import_module("deepspeed")
    if device == "cpu":
        # Its all-reduce through shared memory; gloo's does as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed
