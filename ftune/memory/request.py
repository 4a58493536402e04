"""What a run's memory depends on, as one value."""

from __future__ import annotations

from dataclasses import dataclass

from ftune.methods import Method, ModelShape

__all__ = ["Request", "stored_bytes"]


@dataclass(frozen=True)
class Request:
    """What is estimated: training of a model of this shape, on one device, that of one rank where there are several.

    Another run's estimate is ``estimate(dataclasses.replace(request, ...))``.

    Attributes:
        method: The method, with its settings.
        shape: The base model.
        optimizer: Its name in the recipe.
        dtype_bytes: Bytes of an element in the dtype the model computes in.
        rows: Sequences in a micro-batch.
        length: Tokens in a row.
        target_tokens: Tokens in the loss, in a micro-batch.
        recomputed_blocks: How many of the first blocks are recomputed in the backward pass.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        device_type: ``cpu`` or ``cuda``.
        packed: Whether rows hold several documents, which takes a mask to keep apart.
        engine: How processes share what they hold (``ftune.memory.sharding``).
        processes: How many there are.
        fused_loss: On CUDA, whether one kernel puts the gradient of logits in their place (``ftune.ops.fused``).
        row_shapes: How many shapes micro-batches have, each of which takes kernels of its own on a CPU.
        longest: Tokens of the longest of the rows that are concatenated into one; None where they are not.
    """

    method: Method
    shape: ModelShape
    optimizer: str
    dtype_bytes: int
    rows: int
    length: int
    target_tokens: int
    recomputed_blocks: int
    attention: str
    device_type: str
    packed: bool
    engine: str = "ddp"
    processes: int = 1
    fused_loss: bool = True
    row_shapes: int = 1
    longest: int | None = None

    @property
    def stored(self) -> int:
        """Bytes of a base weight that is not quantized, as the method keeps it."""
        return stored_bytes(self.method, self.dtype_bytes)

    @property
    def whole(self) -> bool:
        """Whether the base model itself trains."""
        return self.method.artifact == "model"

    @property
    def trains_output(self) -> bool:
        """Whether the matrix that gives the logits trains: of a whole model, or an embedding that is the head too."""
        return self.whole or (self.method.trains_head and not self.shape.head)


def stored_bytes(method: Method, dtype_bytes: int) -> int:
    """Bytes of a base weight that is not quantized, as the method keeps it."""
    import torch

    return method.base_dtype(torch.float32 if dtype_bytes == 4 else torch.bfloat16).itemsize
