"""VeRA's frozen random projections (Kopiczko et al., arXiv:2310.11454, sec. 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_projections"]


def draw_projections(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the projections that all adapted layers share, as PEFT draws them on an fp32 base.

    Both are uniform with Kaiming's bound ``sqrt(6 / fan_in)``, A first.

    Args:
        rank: R, the rows of A.
        in_features: N, the widest input of any adapted layer.
        out_features: M, the widest output.
        seed: Of the CPU generator.

    Returns:
        ``A`` (R, N) and ``B`` (M, R), fp32, on the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    return uniform(rank, in_features), uniform(out_features, rank)
