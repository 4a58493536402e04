"""What an engine does for the loop, and the one that copies the model onto every process (DDP)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ftune.ops.sharded import whole

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.optim import Optimizer

    from ftune.methods import Method
    from ftune.run.objective import Objective

__all__ = ["Ddp", "Engine", "Gathered", "average", "average_gradients", "put_whole"]

BUCKET = 2**23
"""Elements that travel together: one message for each small tensor would cost more than what it carries."""


@dataclass(frozen=True)
class Gathered:
    """What a checkpoint holds of model and optimizer, whole, on the CPU: the same from every engine.

    Attributes:
        trained: The parameters that require grad, by name; tied ones once.
        optimizer: The optimizer's ``state_dict``.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Any]


class Engine:
    """How processes share an update.

    The loop divides each loss by the target tokens of the whole update and multiplies it by the number of processes:
    an engine averages gradients over processes, and their sum is then the gradient of the mean.

    Args:
        accelerator: Knows the device and the other processes.
    """

    name: ClassVar[str]
    lockstep: ClassVar[bool] = False
    """Whether a forward pass is an exchange too, so that every process must make as many as the others."""
    keeps_gradients: ClassVar[bool] = True
    """Whether parameters still have their gradients after the update."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @property
    def world_size(self) -> int:
        """Processes that share an update."""
        return int(self.accelerator.num_processes)

    def wrap(self, objective: Objective, optimizer: Optimizer, method: Method) -> nn.Module:
        """Make the objective one that trains on all processes; it is called in place of ``objective``.

        Whole until now, with the parameters and the optimizer state of a resumed run in it, it may be sharded in
        place: then the optimizer's parameters and state are replaced by their parts.
        """
        raise NotImplementedError

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """The context of a micro-batch that is not the update's last: gradients need not travel yet."""
        return nullcontext()

    def after_evaluation(self) -> None:
        """Called behind every evaluation, before the next update."""

    def exchange(self, trained: Sequence[nn.Parameter]) -> None:
        """Average the gradients that the last backward pass did not average by itself."""

    def gradient_norm(self, method: Method, trained: Sequence[nn.Parameter], optimizer: Optimizer) -> float:
        """The global norm of the update's gradients, exchanged and not yet clipped; not finite where one of them is."""
        return method.gradient_norm(trained, optimizer)

    def update(self, trained: Sequence[nn.Parameter], optimizer: Optimizer, bound: float | None, norm: float) -> None:
        """Clip gradients of this norm to a bound, where there is one, and let the optimizer step."""
        if bound is not None:
            torch.nn.utils.clip_grads_with_norm_(trained, bound, torch.tensor(norm))
        optimizer.step()

    def whole_adapters(self, model: nn.Module, method: Method) -> AbstractContextManager[Any]:
        """A context in which adapters are whole on every process, so that a method can look at them; all enter it."""
        return nullcontext()

    def gather(self, model: nn.Module, optimizer: Optimizer) -> Gathered | None:
        """Everything trained, whole; every process asks, the main one gets it. None: it is whole where it lies."""
        return None

    def make_whole(self, model: nn.Module) -> None:
        """Put whole parameters into the main process's model, on the CPU, to be saved: it trains no more."""


class Ddp(Engine):
    """Every process has the whole model; gradients are averaged (DistributedDataParallel). One process: nothing.

    Args:
        accelerator: Knows the device and the other processes.
        at_end: Whether gradients travel when all of an update are made, instead of with its last backward pass. Until
            then no process waits for another, so that one which runs out of memory can say so.
    """

    name = "ddp"

    def __init__(self, accelerator: Accelerator, *, at_end: bool = False) -> None:
        super().__init__(accelerator)
        self.at_end = at_end

    def wrap(self, objective: Objective, optimizer: Optimizer, method: Method) -> nn.Module:
        """Let gradients travel with the backward pass."""
        return self.accelerator.prepare_model(objective) if self._with_backward else objective

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Gradients stay here."""
        return self.accelerator.no_sync(wrapped) if self._with_backward else nullcontext()

    def exchange(self, trained: Sequence[nn.Parameter]) -> None:
        """Average all gradients, where they did not travel yet."""
        if self.at_end and self.world_size > 1:
            average_gradients(trained, self.world_size, self.accelerator.device)

    @property
    def _with_backward(self) -> bool:
        return self.world_size > 1 and not self.at_end


@torch.no_grad()
def put_whole(model: nn.Module, parts: Callable[[nn.Parameter], bool], *, main: bool) -> None:
    """Gather one parameter after another, and put it into the main process's model, on the CPU.

    Args:
        model: The same on every process; all of them call.
        parts: Whether a parameter is one to gather.
        main: Whether this is the main process; the others keep what they have.
    """
    # A tied one stays tied, and every process asks for it once: None where nothing is kept.
    made: dict[nn.Parameter, nn.Parameter | None] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parts(parameter):
                continue
            if parameter not in made:
                found = whole(parameter)
                # In a storage of its own: whole weights of ZeRO-2 share one.
                made[parameter] = nn.Parameter(found.detach().to("cpu", copy=found is parameter)) if main else None
            if (kept := made[parameter]) is not None:
                setattr(module, name, kept)


def average_gradients(parameters: Sequence[nn.Parameter], world: int, device: torch.device) -> None:
    """Average gradients over processes; a parameter that only some of them used (an expert) counts as zero elsewhere.

    Args:
        parameters: The same on every process, in the same order.
        world: The processes.
        device: Where messages between them lie.
    """
    from torch import distributed

    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=device)
    distributed.all_reduce(used, op=distributed.ReduceOp.MAX)
    shared = [p for p, by_any in zip(parameters, used.tolist(), strict=True) if by_any]
    for parameter in shared:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average([p.grad for p in shared if p.grad is not None], world)


def average(tensors: list[Tensor], world: int) -> None:
    """Average tensors over processes, in place, many in one message."""
    from torch import distributed

    for bucket in _buckets(tensors):
        # Of one alone, an embedding's perhaps, no copy: it may be the largest tensor of the run.
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0].view(-1) if alone else torch.cat([tensor.flatten() for tensor in bucket])
        distributed.all_reduce(flat)
        flat /= world
        if alone:
            continue
        for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, of at most ``BUCKET`` elements together; a larger one is alone."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or elements + tensor.numel() > BUCKET):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
