"""Dense updates as low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factorize"]


def factorize(
    update_MN: Tensor, rank: int | None, *, energy: float = 1.0, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Factor an update by its truncated singular value decomposition (Eckart and Young, 1936).

    Args:
        update_MN: The update, (M, N), fp32.
        rank: Rank of the factors; None: the least that holds ``energy``.
        energy: Share of the squared Frobenius norm to hold.
        limit: The highest rank to take for it.

    Returns:
        ``A`` (r, N) and ``B`` (M, r) with ``B A`` closest to the update; the root of each singular value in each.
    """
    u_MK, s_K, vh_KN = torch.linalg.svd(update_MN, full_matrices=False)
    if rank is None:
        held_K = s_K.double().square().cumsum(0)
        rank = int((held_K < energy * held_K[-1]).sum()) + 1
        rank = min(rank, limit or rank)
    rank = min(rank, s_K.numel())
    root_R = s_K[:rank].sqrt()
    return root_R[:, None] * vh_KN[:rank], u_MK[:, :rank] * root_R
