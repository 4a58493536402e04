"""Which parameters weight decay pulls towards zero: matrices, and nothing for which zero is not neutral."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["undecayed"]


def undecayed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that never decay, whatever their shape.

    - vectors: norms' weights, biases, magnitudes, and of state-space layers ``D`` and ``dt_bias``;
    - stacks of vectors: biases of all experts (n, M), norms of all heads (H, D), a vector kept as (1, 1, D);
    - ``A_log`` (N, S) of state-space layers, logarithms of decay rates: zero is a rate of one. Mamba's authors leave it
      out, with ``D`` and ``dt_bias``, and let the weights of their short convolutions (C, 1, K) decay, which are
      matrices of taps.
    """
    found = set()
    for prefix, module in model.named_modules():
        is_norm = "norm" in type(module).__name__.lower()
        for leaf, parameter in module.named_parameters(recurse=False):
            # A matrix may have one row or column (LoRA of rank 1); more dimensions with one longer than 1 are a vector.
            vector = parameter.ndim < 2 or (parameter.ndim > 2 and max(parameter.shape) == math.prod(parameter.shape))
            marked = getattr(parameter, "_no_weight_decay", False)
            if vector or marked or is_norm or leaf == "A_log" or leaf.endswith("bias"):
                found.add(f"{prefix}.{leaf}" if prefix else leaf)
    return frozenset(found)
