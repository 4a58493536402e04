"""Join the processes that share a run, and hold that they are those that were launched.

accelerate falls back in silence: without its CPU flag, processes of torchrun stay alone on a machine without GPUs;
its own plugin for FSDP or DeepSpeed becomes plain DistributedDataParallel on a CPU. A run that trains otherwise than
was asked for, or N runs that write the same files, is worse than none.
"""

from __future__ import annotations

import atexit
import datetime
import gc
import os
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from ftune.errors import FtuneError, RunFailed

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["join_processes", "require_agreement", "require_joined", "require_launcher"]

# What one process waits for another: tokenizing, loading and saving happen in between.
_TIMEOUT = datetime.timedelta(minutes=30)


def join_processes(*, offload: bool = False) -> Accelerator:
    """Make the Accelerator of this run; with several processes, the process group too.

    What the launch configuration asks for beside that, ``ftune.plan.engine.choose_engine`` has honoured or refused.

    Args:
        offload: Whether parts of a sharded model lie in the host's memory, and are sent from there too.

    Raises:
        RunFailed: accelerate did not join the processes that were launched, or there are more than GPUs.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    world, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if cuda and here > torch.cuda.device_count():
        raise RunFailed(
            f"{here} processes were launched on this machine, which has {torch.cuda.device_count()} GPUs",
            help="start one process for each GPU",
        )
    # NCCL knows GPUs only.
    both = {"backend": "cuda:nccl,cpu:gloo"} if offload and cuda else {}
    accelerator = Accelerator(
        # Without the flag, processes launched by torchrun on a machine without accelerators stay alone.
        cpu=not cuda,
        mixed_precision="no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT, **both)],
    )
    if world > 1:
        atexit.register(_leave_processes)
    require_joined(accelerator, world, cuda=cuda)
    return accelerator


def require_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """Hold that a launcher's variables, where there are any, are all there and numbers.

    Raises:
        FtuneError: They are not: they were left by something else, or set by hand.
    """
    found = {name: environment[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in environment}
    said = ", ".join(f"{name}={value}" for name, value in found.items())
    help = f"unset {' '.join(found)}; several processes are started by --num-processes, torchrun or accelerate launch"
    if not all(value.isdecimal() for value in found.values()):
        raise FtuneError(f"{said} in the environment: a launcher sets whole numbers", help=help)
    if "MASTER_ADDR" not in environment and (found.get("WORLD_SIZE", "1") != "1" or "LOCAL_RANK" in found):
        raise FtuneError(f"{said} in the environment, as in one process of many, without MASTER_ADDR", help=help)


def require_joined(accelerator: Accelerator, world: int, *, cuda: bool) -> None:
    """Hold that accelerate sees the processes that were launched, joined as they should be.

    Raises:
        RunFailed: It sees others, or joined them in another way.
    """
    wanted = "NO" if world == 1 else "MULTI_GPU" if cuda else "MULTI_CPU"
    joined = accelerator.distributed_type.value
    if accelerator.num_processes != world:
        raise RunFailed(f"{world} processes were launched, but accelerate joined {accelerator.num_processes}")
    if joined != wanted:
        raise RunFailed(f"accelerate runs {joined}, where {wanted} was to be expected from how ftune was launched")


def require_agreement(accelerator: Accelerator, facts: dict[str, Any]) -> None:
    """Hold that every process is about to do the same: on other machines files may be older, or libraries.

    Args:
        accelerator: Whose processes must agree; all of them must call.
        facts: JSON-able, by what they are called in the message.

    Raises:
        RunFailed: On every process: what differs, and on which.
    """
    from accelerate.utils import gather_object

    first, *others = gather_object([facts])
    for rank, other in enumerate(others, start=1):
        differ = [name for name in first if other.get(name) != first[name]]
        if differ:
            raise RunFailed(
                f"process {rank} is not about to do what process 0 is: {', '.join(differ)} differ",
                help="every machine must see the same recipe, data and model, and have the same libraries",
            )


def _leave_processes() -> None:
    """End the process group, and gloo's threads with it, before the interpreter ends.

    One of them that asks for the interpreter's lock as it ends would abort the process ("terminate called without an
    active exception"). They live as long as something holds the group. A sharded model does, which is in cycles;
    functions of torch and of DeepSpeed do, as `group=group.WORLD` in a signature is the group there was when their
    module was imported; and DTensor's caches, by way of a DeviceMesh.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    gc.collect()
    gc.unfreeze()  # or functions made while libraries were imported are not among the objects
    for held in gc.get_objects():
        if type(held) is FunctionType and any(value is group for value in held.__defaults__ or ()):
            held.__defaults__ = tuple(None if value is group else value for value in held.__defaults__ or ())
        elif type(held) is DeviceMesh:
            getattr(held, "_pg_registry", {}).clear()
