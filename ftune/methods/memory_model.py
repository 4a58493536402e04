"""What the memory estimate asks of a method: shapes in, bytes out; the third of its three parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftune.methods.description import Description
from ftune.methods.optimizer import state_bytes_per_element

if TYPE_CHECKING:
    from ftune.methods.types import ModelShape

__all__ = ["MemoryModel"]


class MemoryModel(Description):
    """Defaults for a method that adds fp32 parameters beside frozen weights; only shapes are looked at."""

    def trainable_parameters(self, shape: ModelShape) -> int:
        """How many parameters ``adapt`` makes trainable on a model of this shape."""
        raise NotImplementedError

    def base_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """Bytes of the base weights as they lie in memory during training.

        4-bit for the projections inside the blocks when quantized; the rest in the model's dtype.
        """
        if self.base_quantization is None:
            return shape.parameters * dtype_bytes
        quantized = sum(linear.elements for linear in shape.linears if linear.quantizable)
        bits = self.base_quantization.bits_per_weight
        return int((shape.parameters - quantized) * dtype_bytes + quantized * bits / 8)

    def adapter_bytes(self, shape: ModelShape) -> int:
        """Bytes of the trainable parameters that are not themselves base weights."""
        return 4 * self.trainable_parameters(shape)

    def gradient_bytes(self, shape: ModelShape) -> int:
        """Bytes of the gradients that are held at once."""
        return 4 * self.trainable_parameters(shape)

    def optimizer_bytes(self, shape: ModelShape, optimizer: str) -> int:
        """Bytes of optimizer state."""
        return int(self.trainable_parameters(shape) * state_bytes_per_element(optimizer))

    def update_bytes(self, shape: ModelShape, optimizer: str) -> int:
        """Bytes of temporaries of ``optimizer.step()`` on CUDA.

        torch's AdamW updates all parameters at once there (foreach), through one more copy of what trains.
        """
        return 4 * self.trainable_parameters(shape) if optimizer == "adamw" else 0

    @property
    def whole_state(self) -> bool:
        """Whether each of many processes keeps the whole optimizer state, even where weights lie in parts."""
        return False

    @property
    def trains_head(self) -> bool:
        """Whether an adapter method trains the output head whole, where it is tied to the embedding."""
        return False

    def mask_cells(self, length: int, packed: bool) -> int:
        """Cells of the attention masks that each layer keeps for a row, where the method's attention takes some."""
        return 0

    def saved_bytes(self, shape: ModelShape, dtype_bytes: int) -> int:
        """Bytes that a forward pass keeps for the backward pass, whatever the number of tokens."""
        return 0

    def products(self, shape: ModelShape) -> int:
        """Products, different in shape, that what trains adds to those of frozen layers, for one size of batch."""
        return 0

    def stream_bytes(self, stored: int) -> int:
        """Bytes of an element of the residual stream, which recomputed blocks keep; stored: of a base weight."""
        return stored

    def saved_bytes_per_token(self, shape: ModelShape, dtype_bytes: int) -> int:
        """Bytes of activations that the method keeps for the backward pass, above the base model's own."""
        return 0
