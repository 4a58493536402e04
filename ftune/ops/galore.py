"""The tensor arithmetic of GaLore: subspaces of a gradient, Adam inside them, moments in 8 bits, weights in bf16.

Legend: a matrix is (M, N); S is its shorter side and L its longer one; r is the rank. The shorter side is
projected (GaLore, arXiv:2403.03507, sec. 4), so what is projected is (M, r) where M >= N, else (r, N): it lies
as its matrix does, and everything here finds the side from the shape alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "BLOCK",
    "Basis",
    "adam_direction",
    "captured_energy",
    "coarse_products",
    "from_8bit",
    "lift",
    "project",
    "rotate_moments",
    "round_to_bfloat16",
    "subspace",
    "to_8bit",
]

Basis = Literal["eigh", "svd", "randomized"]

BLOCK = 256
"""Elements that share a scale in 8 bits, as in the optimizers of bitsandbytes."""

_OVERSAMPLING = 8


# --- subspaces ---------------------------------------------------------------------------------------------


def subspace(grad_MN: Tensor, rank: int, how: Basis, generator: torch.Generator | None = None) -> Tensor:
    """The ``rank`` leading singular vectors of a gradient, on its shorter side.

    Args:
        grad_MN: Finite, of any float dtype; everything is computed in fp32.
        rank: At most the shorter side.
        how: ``svd``: of the gradient itself. ``eigh``: of its Gram matrix (S, S), the same vectors for less time;
            directions whose singular value is below about 3e-4 of the largest drown in rounding, and carry less
            than 1e-7 of the energy. ``randomized``: a sketch with one power iteration (Halko, Martinsson and Tropp,
            arXiv:0909.4061, algorithms 4.4 and 5.1), cheapest and least exact.
        generator: The sketch is drawn from it, on its device. On another kind of device it is another sketch.

    Returns:
        (S, r) in fp32, columns orthonormal, the leading one first. The largest element of each is positive: a
        singular vector's sign is arbitrary, and one that flips would turn the moments kept beside it around.

    Raises:
        ValueError: The rank exceeds the shorter side.
    """
    tall_LS = grad_MN.float() if grad_MN.shape[0] >= grad_MN.shape[1] else grad_MN.float().T
    if rank > tall_LS.shape[1]:
        raise ValueError(f"rank {rank} exceeds the shorter side of {tuple(grad_MN.shape)}")
    # Squares of small gradients would leave the range of fp32.
    tall_LS = tall_LS / tall_LS.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    if how == "svd":
        basis_Sr = torch.linalg.svd(tall_LS, full_matrices=False).Vh[:rank].T
    elif how == "eigh":
        basis_Sr = _leading(tall_LS.T @ tall_LS, rank)
    else:
        width = min(rank + _OVERSAMPLING, tall_LS.shape[1])
        device = tall_LS.device if generator is None else generator.device
        noise = torch.randn(tall_LS.shape[0], width, generator=generator, device=device)
        range_Sq = torch.linalg.qr(tall_LS.T @ noise.to(tall_LS.device)).Q
        range_Sq = torch.linalg.qr(tall_LS.T @ (tall_LS @ range_Sq)).Q
        within_Lq = tall_LS @ range_Sq
        basis_Sr = range_Sq @ _leading(within_Lq.T @ within_Lq, rank)
    largest = basis_Sr.gather(0, basis_Sr.abs().argmax(dim=0, keepdim=True))
    signed_Sr: Tensor = basis_Sr * torch.where(largest < 0, -1.0, 1.0)
    return signed_Sr.contiguous()


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the ``rank`` largest eigenvalues, the largest first."""
    ascending: Tensor = torch.linalg.eigh(gram).eigenvectors
    return ascending[:, -rank:].flip(1)


def project(grad_MN: Tensor, basis_Sr: Tensor) -> Tensor:
    """A matrix in the coordinates of the subspace: (M, r) where M >= N, else (r, N)."""
    return grad_MN @ basis_Sr if grad_MN.shape[0] >= grad_MN.shape[1] else basis_Sr.T @ grad_MN


def lift(low: Tensor, basis_Sr: Tensor) -> Tensor:
    """Back from the subspace: (M, r) or (r, N) to (M, N), of rank r at most."""
    return low @ basis_Sr.T if low.shape[0] >= low.shape[1] else basis_Sr @ low


@contextlib.contextmanager
def coarse_products(coarse: bool = True) -> Iterator[None]:
    """Inside, fp32 products on CUDA round their factors to TF32: 10 bits behind the leading one, where bf16 has 7.

    Args:
        coarse: Else nothing changes.
    """
    if not coarse:
        yield
        return
    # Not by `allow_tf32`, which is the old way: torch raises where the two are mixed.
    products: Any = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def captured_energy(grad_MN: Tensor, low: Tensor) -> Tensor:
    """The share of a gradient's squared norm that its projection keeps; 0 for a gradient of zeros."""
    whole = torch.linalg.vector_norm(grad_MN)
    kept: Tensor = torch.linalg.vector_norm(low) / whole.clamp_min(torch.finfo(torch.float32).tiny)
    return kept.square()


# --- Adam --------------------------------------------------------------------------------------------------


def adam_direction(
    first: Tensor, second: Tensor, grad: Tensor, betas: tuple[float, float], eps: float, step: int
) -> Tensor:
    """Take a gradient into Adam's moments, in place, and return the direction to descend along.

    Args:
        first: First moment, fp32.
        second: Second moment, fp32.
        grad: Of the same shape; in a subspace or not.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        step: Number of this update, from 1 (Kingma and Ba, arXiv:1412.6980, algorithm 1).
    """
    first.lerp_(grad, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return torch.div(first, root, out=root).mul_(1 / (1 - betas[0] ** step))


def rotate_moments(
    first: Tensor, second: Tensor, change_rr: Tensor, betas: tuple[float, float], step: int
) -> tuple[Tensor, Tensor]:
    """Adam's moments in the coordinates of a new subspace.

    Let ``C = Q_new^T Q_old``. The first moment is a mean of gradients and turns as they do: ``C m``. For the second,
    take the coordinates of a gradient as independent, with means ``m`` and variances ``v - m^2`` (both without their
    bias); then the new coordinates have the second moments ``C^2 (v - m^2) + (C m)^2``, squares by element
    (LDAdam, arXiv:2410.16103, sec. 3, where it is used at every step). The two moments decay at different rates, so
    an estimated variance may be negative: it counts as zero, which keeps ``|m| <= sqrt(v)`` and so the update bounded.

    Args:
        first: First moment in the old coordinates.
        second: Second moment in the old coordinates.
        change_rr: ``C``.
        betas: Decay of the moments.
        step: Updates made so far, at least 1.
    """
    bias = [1 - beta**step for beta in betas]

    def turn(change: Tensor, moment: Tensor) -> Tensor:
        return moment @ change.T if moment.shape[0] >= moment.shape[1] else change @ moment

    mean = first / bias[0]
    turned = turn(change_rr, mean)
    variance = (second / bias[1] - mean.square()).clamp_min_(0)
    return turned * bias[0], (turn(change_rr.square(), variance) + turned.square()) * bias[1]


# --- storage -----------------------------------------------------------------------------------------------


def to_8bit(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize by blocks of 256 to the dynamic 8-bit type (Dettmers et al., arXiv:2110.02861, sec. 2).

    Not by bitsandbytes: on the CPU its kernel turns zero into 2e-5 of its block's scale, which would move weights
    that have no gradient. What is unsigned here is a moment that is divided by: a positive value never becomes 0.

    Args:
        values: Finite, fp32, of any shape.
        signed: Whether values may be negative.

    Returns:
        Codes, uint8, of the same shape, and the scale of each block, fp32.
    """
    blocks = functional.pad(values.flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    scaled = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    # The bits of a half, read as an integer, find the code in one look: eleven bits of precision for eight.
    bits = scaled.half().view(torch.int16).int().add_(2**15)
    codes = _codes_of_halves(signed, values.device).index_select(0, bits.flatten())[: values.numel()]
    codes = codes.view(values.shape)
    if not signed:
        codes.masked_fill_((codes == 0) & (values > 0), 1)
    return codes, scales


def from_8bit(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """What ``to_8bit`` stored, in fp32."""
    padded = functional.pad(codes.flatten(), (0, -codes.numel() % BLOCK))
    values = _table(signed, codes.device).index_select(0, padded.int()).view(-1, BLOCK).mul_(scales[:, None])
    return values.flatten()[: codes.numel()].view(codes.shape)


@functools.cache
def _table(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the dynamic type, ascending: seven decades, each with twice the steps of the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += middles.tolist() + (-middles).tolist() * signed
    return torch.tensor(sorted(values), device=device)


@functools.cache
def _codes_of_halves(signed: bool, device: torch.device) -> Tensor:
    """The nearest code of every half-precision number, in the order of its bits as an integer."""
    table = _table(signed, torch.device("cpu"))
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).float().nan_to_num()
    return torch.bucketize(halves, (table[1:] + table[:-1]) / 2).to(device, torch.uint8)


def round_to_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 up or down to bf16, at random, so that the mean is the value (arXiv:2010.06192, sec. 3).

    A bf16 number has the upper 16 bits of its fp32: a random number below 2^16 is added to the lower ones, and
    carries into the upper as often as they are near to it.

    Args:
        values: Finite, fp32.
        generator: On the device of ``values``.
    """
    noise = torch.randint(2**16, values.shape, generator=generator, device=values.device, dtype=torch.int32)
    bits = noise.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(2**16))
    return bits.view(torch.float32).bfloat16()
