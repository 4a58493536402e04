"""Bytes of the states that GaLore's optimizer keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

__all__ = ["bits_of", "tensor_bytes"]


def bits_of(optimizer: str) -> int:
    """Bits of a state, from the optimizer's name in the recipe."""
    return 8 if "8bit" in optimizer else 32


def tensor_bytes(elements: int, bits: int) -> int:
    """Of a stored matrix: fp32, or a byte an element and an fp32 scale for each block of 256."""
    return 4 * elements if bits == 32 else elements + 4 * -(-elements // 256)
