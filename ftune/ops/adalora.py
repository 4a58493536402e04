"""AdaLoRA's own mathematics (arXiv:2303.10512): the update is ``scale * B diag(E) A``.

Shape suffixes: r rank, N inputs, M outputs of a projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["low_rank_factors", "orthogonality"]


def orthogonality(right_rN: Sequence[Tensor], left_Mr: Sequence[Tensor]) -> Tensor:
    """How far the singular vectors are from orthonormal: the mean of ``||A A^T - I||_F`` and ``||B^T B - I||_F``.

    The paper (eq. 4) sums the squares; its authors' code, and PEFT, take the mean of the norms, whose weight then
    means the same on every model. This is theirs.

    Args:
        right_rN: Every ``A``, (r, N).
        left_Mr: Every ``B``, (M, r).

    Returns:
        A scalar with a graph.
    """
    grams = [a @ a.T for a in right_rN] + [b.T @ b for b in left_Mr]
    distances = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
    return torch.stack(distances).mean()


def low_rank_factors(
    a_rN: Tensor, e_r1: Tensor, b_Mr: Tensor, scale: float, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Write ``scale * B diag(E) A`` as the product of two matrices, (k, N) and (M, k).

    Pruned triplets, whose singular value is zero, fall away; so k is the rank that is left.

    Args:
        a_rN: Right singular vectors.
        e_r1: Singular values.
        b_Mr: Left singular vectors.
        scale: Folded into the first factor.
        rank: At most this many dimensions, the best in the least-squares sense; None: all that are left.
    """
    left = e_r1.flatten() != 0
    a_kN, b_Mk = scale * (e_r1 * a_rN)[left], b_Mr[:, left]
    if rank is None or len(a_kN) <= rank:
        return a_kN, b_Mk
    # The trained vectors are only nearly orthogonal: the best cut needs the true singular vectors of the product.
    q_Mk, upper_kk = torch.linalg.qr(b_Mk)
    p_Nk, lower_kk = torch.linalg.qr(a_kN.T)
    u_kk, s_k, vh_kk = torch.linalg.svd(upper_kk @ lower_kk.T)
    return s_k[:rank, None] * vh_kk[:rank] @ p_Nk.T, q_Mk @ u_kk[:, :rank]
