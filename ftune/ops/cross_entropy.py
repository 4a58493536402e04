"""The head and its cross-entropy in chunks: the logits never exist at once.

The gradient of the hidden states is made while the loss is (and that of the head's weight, where it trains), so a
chunk's logits are freed before the next one's are made, and the backward pass only scales. The memory it takes is
``chunk x V``, whatever the number of positions. The mathematics is that of ``F.cross_entropy(head(x).float())``:
nothing is approximated.

Sources: Hsu et al., Liger Kernel (arXiv:2410.10989), sec. 3.2, for the gradient made in the forward pass; Wijmans et
al., Cut Your Losses (arXiv:2411.09009), for never materialising the logits.

Shape suffixes: N positions, C positions in a chunk, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftune.ops.kernels import has_fused

__all__ = ["chunk_size", "chunked_cross_entropy", "least_chunk", "linear_cross_entropy"]

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Bytes of a chunk's fp32 logits: enough rows for fast products, little beside a model's activations. Every chunk
reads the whole weight, for which a GPU needs many more rows."""

STEP = 16
"""On the CPU 16-bit products are of a multiple of so many positions: oneDNN keeps a kernel for every shape."""


def chunk_size(vocab: int, device_type: str = "cpu", *, least: int = 32) -> int:
    """Positions in a chunk: ``CHUNK_BYTES`` of fp32 logits, in multiples of 8, at least ``least``."""
    return max(least, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab) // 8 * 8)


def least_chunk(positions: int, vocab: int, width: int, *, trained: bool) -> int:
    """The least positions in a chunk of ``linear_cross_entropy``.

    Where the weight trains, a chunk reads and writes its whole gradient: as large as the hidden states will do.
    """
    return max(32, positions * width // vocab) if trained else 32


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum of the cross-entropies of ``softcap(scale * (hidden @ weight.T + bias))`` against the targets.

    Args:
        hidden_ND: Hidden states, in the dtype in which the product is computed.
        weight_VD: The head's weight, of any dtype; cast to that of the hidden states.
        targets_N: int64; every one counts, so -100 has no place here.
        bias_V: The head's bias.
        scale: Factor of the logits.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, after the scale.
        chunk: Positions whose logits exist at once; None: ``chunk_size``, and no less than ``least_chunk``.

    Returns:
        fp32, shape (). Differentiable once with respect to hidden states, weight and bias.
    """
    if not torch.is_grad_enabled():
        # A Function is told that a parameter needs a gradient even where none can be asked for.
        weight_VD, bias_V = weight_VD.detach(), None if bias_V is None else bias_V.detach()
    if chunk is None:
        vocab, width = weight_VD.shape
        least = least_chunk(len(targets_N), vocab, width, trained=weight_VD.requires_grad)
        chunk = chunk_size(vocab, weight_VD.device.type, least=least)
    loss: Tensor = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, scale, softcap, chunk)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        scale: float,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        cast_VD = weight_VD.to(hidden_ND.dtype)
        grad_hidden = torch.empty_like(hidden_ND) if wants_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        wants = wants_hidden or wants_weight or wants_bias
        fused = weight_VD.is_cuda and not wants_bias and has_fused()
        buffers = _Buffers(hidden_ND, len(weight_VD), chunk, both=not fused)
        for hidden_CD, targets_C, at in _chunks(hidden_ND, targets_N, chunk):
            low_CV = buffers.logits(hidden_CD, cast_VD, bias_V)
            if fused:
                total += _fused_loss(low_CV, targets_C, scale, softcap, wants)
            else:
                high_CV = buffers.in_fp32(low_CV)
                loss, low_CV = _loss_and_gradient(high_CV, targets_C, low_CV, scale, softcap, wants, grad_bias)
                total += loss
            if grad_hidden is not None:
                buffers.product(low_CV, cast_VD, out=grad_hidden[at : at + len(targets_C)])
            if grad_weight is not None:
                grad_weight += low_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            # The factor is 1 / targets: rounded to 16 bits it would scale every gradient by up to 1 + 2^-9.
            None if grad_hidden is None else (grad_hidden.float() * grad).to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight.mul(grad).to(ctx.dtypes[0]),
            None if grad_bias is None else (grad_bias * grad).to(ctx.dtypes[1]),
            *[None] * 4,
        )


class _Buffers:
    """Where every chunk's logits are made: fresh memory of this size costs more than what is computed in it.

    The C library hands such blocks back to the system, and each is zeroed, page by page, when it is next touched.

    Args:
        hidden_ND: Hidden states.
        vocab: V.
        chunk: Rows.
        both: Whether fp32 ones are needed beside those in the dtype of the product.
    """

    def __init__(self, hidden_ND: Tensor, vocab: int, chunk: int, *, both: bool) -> None:
        self._step = STEP if hidden_ND.device.type == "cpu" and hidden_ND.dtype != torch.float32 else 1
        rows = self._rounded(min(chunk, len(hidden_ND)))
        self.low_CV = self.high_CV = hidden_ND.new_empty(rows, vocab)
        if both and hidden_ND.dtype != torch.float32:
            self.high_CV = self.low_CV.new_empty(rows, vocab, dtype=torch.float32)

    def _rounded(self, rows: int) -> int:
        return -(-rows // self._step) * self._step

    def logits(self, hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """``hidden @ weight.T + bias`` in ``low_CV``, as of a rounded number of rows."""
        rows = self._rounded(len(hidden_CD))
        wide_CD = hidden_CD if rows == len(hidden_CD) else F.pad(hidden_CD, (0, 0, 0, rows - len(hidden_CD)))
        torch.mm(wide_CD, weight_VD.T, out=self.low_CV[:rows])
        low_CV = self.low_CV[: len(hidden_CD)]
        if bias_V is not None:
            low_CV += bias_V.to(low_CV.dtype)
        return low_CV

    def in_fp32(self, low_CV: Tensor) -> Tensor:
        """The same logits in ``high_CV``."""
        if self.high_CV is self.low_CV:
            return low_CV
        return self.high_CV[: len(low_CV)].copy_(low_CV)

    def product(self, grad_CV: Tensor, weight_VD: Tensor, out: Tensor) -> None:
        """``grad @ weight`` into ``out``; the gradient lies in one of the buffers."""
        rows = self._rounded(len(grad_CV))
        if rows == len(grad_CV):
            torch.mm(grad_CV, weight_VD, out=out)
            return
        self.low_CV[len(grad_CV) : rows].zero_()
        out.copy_(torch.mm(self.low_CV[:rows], weight_VD)[: len(out)])


def _fused_loss(logits_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None, wants: bool) -> Tensor:
    """The loss of a chunk; where ``wants``, one kernel puts the gradient of the logits in their place."""
    from ftune.ops.fused import softmax_minus_target

    return softmax_minus_target(logits_CV, targets_C, scale, softcap, wants_grad=wants).sum()


def _loss_and_gradient(
    logits_CV: Tensor,
    targets_C: Tensor,
    low_CV: Tensor,
    scale: float,
    softcap: float | None,
    wants: bool,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk, and where ``wants`` the gradient of its logits in the dtype of the product.

    The logits, in fp32, are overwritten; ``low_CV`` is room for the gradient. What the bias gets is added to
    ``grad_bias``.
    """
    logits_CV, slope_CV = _scaled(logits_CV, scale, softcap)
    log_CV = _log_softmax(logits_CV)
    loss = -log_CV.gather(1, targets_C[:, None]).sum()
    if not wants:
        return loss, low_CV
    # softmax minus one-hot, in place; then back through the cap and the scale
    grad_CV = log_CV.exp_()
    grad_CV[torch.arange(len(targets_C), device=targets_C.device), targets_C] -= 1
    if slope_CV is not None:
        grad_CV.mul_(slope_CV)
    if scale != 1.0:
        grad_CV.mul_(scale)
    if grad_bias is not None:
        grad_bias += grad_CV.sum(0)
    return loss, grad_CV if low_CV.dtype == torch.float32 else low_CV.copy_(grad_CV)


def _scaled(logits_CV: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Scale and cap a chunk's logits in place; returns them, and the slope of the cap where there is one."""
    if scale != 1.0:
        logits_CV *= scale
    if softcap is None:
        return logits_CV, None
    tanh_CV = logits_CV.div_(softcap).tanh_()
    slope_CV = 1 - tanh_CV * tanh_CV
    return tanh_CV.mul_(softcap), slope_CV


def _log_softmax(logits_CV: Tensor) -> Tensor:
    """In the place of the logits, in as many positions at once as a copy of them is little."""
    if logits_CV.device.type == "cpu":
        # Its kernel reads an element last where it writes it; no other device's was looked at for that.
        torch.ops.aten._log_softmax.out(logits_CV, 1, False, out=logits_CV)
        return logits_CV
    return _log_softmax_by_rows(logits_CV)


def _log_softmax_by_rows(logits_CV: Tensor) -> Tensor:
    for at in range(0, len(logits_CV), 64):
        logits_CV[at : at + 64] -= logits_CV[at : at + 64].logsumexp(-1, keepdim=True)
    return logits_CV


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor], hidden_ND: Tensor, targets_N: Tensor, vocab: int, chunk: int | None = None
) -> Tensor:
    """The same loss through any head (one with an adapter on it): each chunk's logits are made twice.

    Args:
        head: Hidden states (C, D) to logits (C, V), the cap and the scale included.
        hidden_ND: Hidden states.
        targets_N: int64.
        vocab: V.
        chunk: Positions whose logits exist at once; None: ``chunk_size(vocab)``.

    Returns:
        fp32, shape (). Gradients reach the hidden states and whatever trains inside ``head``.
    """

    def loss(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden_CD).float(), targets_C, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for hidden_CD, targets_C, _ in _chunks(hidden_ND, targets_N, chunk or chunk_size(vocab, hidden_ND.device.type)):
        total = total + checkpoint(loss, hidden_CD, targets_C, use_reentrant=False)
    return total


def _chunks(hidden_ND: Tensor, targets_N: Tensor, chunk: int) -> list[tuple[Tensor, Tensor, int]]:
    return [(hidden_ND[at : at + chunk], targets_N[at : at + chunk], at) for at in range(0, hidden_ND.shape[0], chunk)]
