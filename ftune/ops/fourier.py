"""FourierFT's sparse spectrum (Gao et al., arXiv:2405.03003, sec. 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["update_of"]


def update_of(spectrum_n: Tensor, locations_2n: Tensor, out_features: int, in_features: int, scaling: float) -> Tensor:
    """The dense update of a sparse spectrum: the real part of its inverse discrete Fourier transform, scaled.

    Args:
        spectrum_n: Trained coefficients, (n,), fp32.
        locations_2n: Their rows and columns, (2, n).
        out_features: M.
        in_features: N.
        scaling: Factor of the update.

    Returns:
        (M, N), fp32.
    """
    spectrum_MN = spectrum_n.new_zeros(out_features, in_features)
    spectrum_MN[locations_2n[0], locations_2n[1]] = spectrum_n
    update_MN: Tensor = torch.fft.ifft2(spectrum_MN).real * scaling
    return update_MN
