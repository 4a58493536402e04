"""What one of several processes holds, and what it sends: the rules of each engine.

Under every engine each rank has its own micro-batch, so activations are the same on all.

- ``ddp`` keeps everything on every rank, and adds the gradients of what trains once an update.
- ``deepspeed-zero2`` shares out the gradients of what trains, and AdamW's moments with an fp32 copy of it (ZeRO,
  arXiv:1910.02054, sec. 5); ``deepspeed-zero3`` every weight too. Gradients are reduced in every micro-batch.
- ``fsdp2-offload`` is ``fsdp2`` with those parts in the host's memory.
- ``fsdp2`` shares out weights block by block (PyTorch FSDP, arXiv:2304.11277, sec. 3); embedding and head are gathered
  from the forward pass to the end of the backward one. What an adapter method trains stays on every rank, as in DDP.

Bytes sent a rank, for a payload of S bytes over N ranks in a ring (Patarasuk and Yuan 2009): an all-gather and a
reduce-scatter (N-1)/N S each, an all-reduce both. What is sent is arithmetic; what is held was measured on CPUs
(docs/design/log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftune.memory.request import Request
    from ftune.methods import Method, ModelShape

__all__ = ["communication", "on_host", "per_rank", "shares_state", "while_loading"]

BUCKET = 2**25
"""Elements that DeepSpeed reduces or gathers at once; it keeps a buffer of fp32 gradients of that size."""
PERSISTENT = 100_000
"""Elements up to which ZeRO-3 gathers a weight for good: DeepSpeed's default."""

GATHERED_BLOCKS = 2
"""Blocks whose weights are whole at once: the one that computes, and the next, gathered meanwhile."""


def per_rank(items: dict[str, int], request: Request) -> dict[str, int]:
    """The items of a memory estimate as one rank holds them.

    Args:
        items: Bytes of one process that holds everything.
        request: What they were estimated for.
    """
    method, shape, engine, processes = request.method, request.shape, request.engine, request.processes
    if processes == 1:
        return items
    shared = dict(items)
    if engine == "ddp":
        # DistributedDataParallel sends copies of the gradients.
        shared["buffers"] += items["gradients"]
        return shared

    def share(*names: str) -> None:
        for name in names:
            shared[name] = -(-items[name] // processes)

    if engine.startswith("deepspeed"):
        trained = method.trainable_parameters(shape)
        # Beside AdamW's moments an fp32 copy of what trains, though that is fp32 as well.
        shared["optimizer"] += 4 * trained
        shared["gradients"] = -(-items["gradients"] // processes)
        shared["optimizer"] = -(-shared["optimizer"] // processes)
        shared["buffers"] += 4 * min(BUCKET, trained)
        if engine == "deepspeed-zero3":
            share("weights", "adapters")
            # What computes (a block, or embedding or head), and what is gathered ahead of it.
            outside = max(shape.embedding, shape.head) * request.stored
            block = (items["weights"] - outside_blocks(shape) * request.stored) // shape.layers
            shared["buffers"] += max(block, outside) + min(BUCKET * request.stored, items["weights"])
        return shared
    blocks = items["weights"] - outside_blocks(shape) * request.stored
    gathered = GATHERED_BLOCKS * blocks // shape.layers
    shared["weights"] = -(-blocks // processes) + items["weights"] - blocks
    if request.whole:
        share("gradients", *([] if method.whole_state else ["optimizer"]))
    shared["buffers"] = items["buffers"] + gathered
    if engine == "fsdp2-offload" and request.device_type != "cpu":
        shared["weights"] = items["weights"] - blocks
        if request.whole:
            shared["gradients"] = shared["optimizer"] = 0
    return shared


def while_loading(items: dict[str, int], request: Request) -> int:
    """Bytes on each rank's device while the base is whole there, before the engine shares it out.

    On a CPU the base is a file that all processes map; it counts as nothing there.

    Args:
        items: Bytes of one process that holds everything.
        request: What they were estimated for.

    Returns:
        0 where training needs no less.
    """
    shares_weights = request.engine.startswith(("fsdp2", "deepspeed-zero3"))
    if request.processes == 1 or request.device_type == "cpu" or not shares_weights:
        return 0
    return items["weights"] + items["adapters"] + items["runtime"]


def on_host(request: Request) -> int:
    """Bytes of the host's memory in which one rank keeps its parts; 0 where nothing is offloaded.

    On a CPU what is offloaded lies in the same memory, and is counted there.
    """
    if request.engine != "fsdp2-offload" or request.processes == 1 or request.device_type == "cpu":
        return 0
    method, shape = request.method, request.shape
    parts = method.base_bytes(shape, request.stored)
    if request.whole:
        parts += method.gradient_bytes(shape) + method.optimizer_bytes(shape, request.optimizer)
    return -(-parts // request.processes)


def shares_state(method: Method, engine: str) -> bool:
    """Whether each rank keeps the optimizer state of its share alone, and updates that."""
    if engine.startswith("deepspeed"):
        return True
    return engine.startswith("fsdp2") and method.artifact == "model" and not method.whole_state


def communication(request: Request, accumulation: int) -> dict[str, int]:
    """Bytes that one rank sends in an update, by operation.

    DeepSpeed's ZeRO-2 reduces in every micro-batch, by all-reduces, and gathers what was updated; ZeRO-3 gathers what
    trains too, in fp32. Of the others:

    - ``all_reduce``: of fp32 gradients of what is held whole and trains; once, behind the last micro-batch.
    - ``all_gather``: weights before they compute, forward and backward, in every micro-batch, as they are stored.
    - ``reduce_scatter``: of fp32 gradients that are shared out, in every micro-batch.

    Args:
        request: The run.
        accumulation: Micro-batches in an update.
    """
    method, shape, engine, processes = request.method, request.shape, request.engine, request.processes
    sent = {"all_reduce": 0, "all_gather": 0, "reduce_scatter": 0}
    if processes > 1:
        gradients = 4 * method.trainable_parameters(shape)
        adapter = 0 if request.whole else gradients
        base = method.base_bytes(shape, request.stored) if adapter else shape.parameters * request.stored
        if engine == "ddp":
            sent["all_reduce"] = 2 * gradients
        elif engine == "deepspeed-zero2":
            sent["all_reduce"] = 2 * gradients * accumulation
            sent["all_gather"] = gradients
        elif engine == "deepspeed-zero3":
            sent["all_gather"] = 2 * accumulation * (gradients + (base if adapter else 0))
            sent["reduce_scatter"] = accumulation * gradients
        else:
            # Embedding and head are gathered once, for forward and backward pass.
            outside = outside_blocks(shape) * request.stored
            sent["all_gather"] = accumulation * (2 * (base - outside) + outside)
            sent["all_reduce"] = 2 * adapter
            sent["reduce_scatter"] = accumulation * (gradients - adapter)
    sent = {name: size * (processes - 1) // processes for name, size in sent.items()}
    return sent | {"total": sum(sent.values())}


def outside_blocks(shape: ModelShape) -> int:
    """Elements of embedding, head and last norm."""
    return shape.embedding + shape.head + shape.hidden
