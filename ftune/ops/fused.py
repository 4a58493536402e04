"""The kernels of ``ftune.ops.eager``, and the softmax of the loss, each as one pass over its tensors, on CUDA.

Eager, a norm is eight operations that read and write fp32 copies of its input; beside the products of an 8B model on
an H100 norms and gates then take a third of the time. Written in Triton they read and write every element once. They
round where the eager ones do, so results differ by the order of sums alone.

Tensors that are not on CUDA, and rows too wide for one program, go to the eager functions.

Sources: Tillet et al., Triton (MAPL 2019); the online softmax is Milakov and Gimelshein's (arXiv:1805.02867).

Shape suffixes: N tokens, D width, C positions of a chunk, V vocabulary.
"""

# Triton reads the annotations of kernels at run time: no `from __future__ import annotations` here.
import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ftune.ops.eager import EAGER, Activation, Kernels

__all__ = ["FUSED", "softmax_minus_target", "works"]

WIDEST = 65536
"""Elements of the widest row of a norm that one program holds."""
BLOCK = 1024
"""Elements of a gate in one program."""
SOFTMAX_BLOCK = 8192
"""Elements of a row of logits that a program looks at together."""

_KIND = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


# --- norms -------------------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    x_ptr, w_ptr, rstd_ptr, out_ptr, width, eps, AGAIN: tl.constexpr, OFFSET: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    inside = at < width
    x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
    if AGAIN:
        rstd = tl.load(rstd_ptr + row)
    else:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
        tl.store(rstd_ptr + row, rstd)
    gain = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        out = (x * rstd) * (1.0 + gain)
    else:
        out = gain * (x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, w_ptr, grad_x_ptr, sums_ptr, rows, width, OFFSET: tl.constexpr, WANTS_X: tl.constexpr,
    WANTS_W: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, D)
    inside = at < width
    gain = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        gain += 1.0
    sums = tl.zeros((D,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normed = x * rstd
        if WANTS_W:
            sums += grad * normed
        if WANTS_X:
            inner = tl.where(inside, grad * gain, 0.0)
            mean = tl.sum(inner * normed, 0) / width
            grad_x = (inner - normed * mean) * rstd
            tl.store(grad_x_ptr + row * width + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if WANTS_W:
        tl.store(sums_ptr + program * width + at, sums, mask=inside)


def _norm(x_ND: Tensor, weight_D: Tensor, eps: float, offset: bool) -> tuple[Tensor, Tensor]:
    if not _fits(x_ND):
        return EAGER.norm(x_ND, weight_D, eps, offset)
    rstd_N = x_ND.new_empty((*x_ND.shape[:-1], 1), dtype=torch.float32)
    return _launch_norm(x_ND, weight_D, rstd_N, eps, offset, again=False), rstd_N


def _norm_again(x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, offset: bool) -> Tensor:
    if not _fits(x_ND):
        return EAGER.norm_again(x_ND, rstd_N, weight_D, offset)
    return _launch_norm(x_ND, weight_D, rstd_N, 0.0, offset, again=True)


def _launch_norm(x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, eps: float, offset: bool, *, again: bool) -> Tensor:
    x_ND, weight_D, rstd_N = x_ND.contiguous(), weight_D.contiguous(), rstd_N.contiguous()
    width = x_ND.shape[-1]
    dtype = x_ND.dtype if offset else torch.promote_types(x_ND.dtype, weight_D.dtype)
    out_ND = torch.empty_like(x_ND, dtype=dtype)
    with _on(x_ND):
        _norm_kernel[(x_ND.numel() // width,)](
            x_ND, weight_D, rstd_N, out_ND, width, eps, again, offset, _power(width), num_warps=_warps(width)
        )
    return out_ND


def _norm_backward(
    grad_ND: Tensor, x_ND: Tensor, rstd_N: Tensor, weight_D: Tensor, offset: bool, wants_x: bool, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not _fits(x_ND):
        return EAGER.norm_backward(grad_ND, x_ND, rstd_N, weight_D, offset, wants_x, wants_weight)
    if not (wants_x or wants_weight):
        return None, None
    grad_ND, x_ND = grad_ND.contiguous(), x_ND.contiguous()
    weight_D, rstd_N = weight_D.contiguous(), rstd_N.contiguous()
    width = x_ND.shape[-1]
    rows = x_ND.numel() // width
    # As many programs as run at once, each with a sum of its own: the order of sums is always the same.
    programs = min(rows, 4 * _processors(x_ND))
    grad_x = torch.empty_like(x_ND)
    sums = x_ND.new_empty((programs, width) if wants_weight else (1,), dtype=torch.float32)
    with _on(x_ND):
        _norm_backward_kernel[(programs,)](
            grad_ND, x_ND, rstd_N, weight_D, grad_x, sums, rows, width, offset, wants_x, wants_weight, _power(width),
            num_warps=_warps(width),
        )  # fmt: skip
    return grad_x if wants_x else None, sums.sum(0).to(weight_D.dtype) if wants_weight else None


# --- gates -------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == 0:
        out = x * tl.sigmoid(x)
    elif KIND == 1:
        out = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        out = 0.5 * x * (1.0 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return out


@triton.jit
def _slope(x, KIND: tl.constexpr):
    if KIND == 0:
        s = tl.sigmoid(x)
        out = s * (1.0 + x * (1.0 - s))
    elif KIND == 1:
        out = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        t = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
        out = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
    return out


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, out_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    activated = _activated(gate.to(tl.float32), KIND).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + at, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, count, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    low = tl.load(gate_ptr + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = low.to(tl.float32)
    activated = _activated(gate, KIND).to(low.dtype).to(tl.float32)
    tl.store(grad_up_ptr + at, (activated * grad).to(grad_up_ptr.dtype.element_ty), mask=inside)
    grad_activated = (grad * up).to(low.dtype).to(tl.float32)
    tl.store(grad_gate_ptr + at, (grad_activated * _slope(gate, KIND)).to(grad_gate_ptr.dtype.element_ty), mask=inside)


def _gate(gate_NF: Tensor, up_NF: Tensor, activation: Activation) -> Tensor:
    if not _there(gate_NF) or gate_NF.dtype != up_NF.dtype:
        return EAGER.gate(gate_NF, up_NF, activation)
    gate_NF, up_NF = gate_NF.contiguous(), up_NF.contiguous()
    out_NF = torch.empty_like(gate_NF)
    count = gate_NF.numel()
    with _on(gate_NF):
        _gate_kernel[(triton.cdiv(count, BLOCK),)](gate_NF, up_NF, out_NF, count, _KIND[activation], BLOCK)
    return out_NF


def _gate_backward(
    grad_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, activation: Activation, wants_gate: bool, wants_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    one_dtype = grad_NF.dtype == gate_NF.dtype == up_NF.dtype
    if not _there(gate_NF) or not one_dtype or not (wants_gate and wants_up):
        return EAGER.gate_backward(grad_NF, gate_NF, up_NF, activation, wants_gate, wants_up)
    grad_NF, gate_NF, up_NF = grad_NF.contiguous(), gate_NF.contiguous(), up_NF.contiguous()
    grad_gate, grad_up = torch.empty_like(gate_NF), torch.empty_like(up_NF)
    count = gate_NF.numel()
    with _on(gate_NF):
        _gate_backward_kernel[(triton.cdiv(count, BLOCK),)](
            grad_NF, gate_NF, up_NF, grad_gate, grad_up, count, _KIND[activation], BLOCK
        )
    return grad_gate, grad_up


# --- rotary positions --------------------------------------------------------------------------------------


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, heads, tokens, half, x_row, x_head, x_token, row, token, BACK: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    at = tl.arange(0, HALF)
    inside = (head < heads)[:, None] & (at < half)[None, :]
    x_ptr += (place // tokens) * x_row + (place % tokens) * x_token
    low = tl.load(x_ptr + head[:, None] * x_head + at[None, :], mask=inside, other=0.0)
    high = tl.load(x_ptr + head[:, None] * x_head + at[None, :] + half, mask=inside, other=0.0)
    low, high = low.to(tl.float32), high.to(tl.float32)
    angle = (place // tokens) * row + (place % tokens) * token + at
    low_cos = tl.load(cos_ptr + angle, mask=at < half, other=0.0).to(tl.float32)[None, :]
    high_cos = tl.load(cos_ptr + angle + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    low_sin = tl.load(sin_ptr + angle, mask=at < half, other=0.0).to(tl.float32)[None, :]
    high_sin = tl.load(sin_ptr + angle + half, mask=at < half, other=0.0).to(tl.float32)[None, :]
    dtype = out_ptr.dtype.element_ty
    if BACK:
        crossed_low, crossed_high = high * high_sin, -low * low_sin
    else:
        crossed_low, crossed_high = -high * low_sin, low * high_sin
    new_low = (low * low_cos).to(dtype).to(tl.float32) + crossed_low.to(dtype).to(tl.float32)
    new_high = (high * high_cos).to(dtype).to(tl.float32) + crossed_high.to(dtype).to(tl.float32)
    out_ptr += (place * heads + head[:, None]) * 2 * half + at[None, :]
    tl.store(out_ptr, new_low.to(dtype), mask=inside)
    tl.store(out_ptr + half, new_high.to(dtype), mask=inside)


def _rotate(x_BHLD: Tensor, cos_BLD: Tensor, sin_BLD: Tensor, back: bool) -> Tensor:
    if not _there(x_BHLD):
        return EAGER.rotate(x_BHLD, cos_BLD, sin_BLD, back)
    if x_BHLD.stride(-1) != 1:
        x_BHLD = x_BHLD.contiguous()
    cos_BLD, sin_BLD = cos_BLD.contiguous(), sin_BLD.contiguous()
    rows, heads, tokens, width = x_BHLD.shape
    half = width // 2
    # As projections make their outputs and take their gradients: (B, L, H, D) in memory.
    out = x_BHLD.new_empty(rows, tokens, heads, width, dtype=torch.promote_types(x_BHLD.dtype, cos_BLD.dtype))
    block = min(_power(heads), max(1, 2 * BLOCK // _power(half)))
    with _on(x_BHLD):
        _rotate_kernel[(rows * tokens, triton.cdiv(heads, block))](
            x_BHLD, cos_BLD, sin_BLD, out, heads, tokens, half, *x_BHLD.stride()[:3],
            cos_BLD.stride(0) if len(cos_BLD) > 1 else 0, width, back, block, _power(half),
        )  # fmt: skip
    return out.transpose(1, 2)


FUSED = Kernels(_norm, _norm_again, _norm_backward, _gate, _gate_backward, _rotate)


# --- the loss ----------------------------------------------------------------------------------------------


@triton.jit
def _softmax_kernel(
    logits_ptr, targets_ptr, loss_ptr, vocab, scale, cap, CAPPED: tl.constexpr, WANTS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    target = tl.load(targets_ptr + row)
    # Before the first loop, whose sums all threads wait for: the second one overwrites it.
    logit = tl.load(logits_ptr + target).to(tl.float32) * scale
    if CAPPED:
        logit = cap * _tanh(logit / cap)
    largest = -3.0e38  # not -inf, from which -inf cannot be taken
    total = 0.0
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32) * scale
        if CAPPED:
            x = tl.where(at < vocab, cap * _tanh(x / cap), float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
    log_total = largest + tl.log(total)
    tl.store(loss_ptr + row, log_total - logit)
    if WANTS_GRAD:
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + at, mask=at < vocab, other=0.0).to(tl.float32) * scale
            slope = scale
            if CAPPED:
                tanh = _tanh(x / cap)
                x = cap * tanh
                slope = scale * (1.0 - tanh * tanh)
            grad = (tl.exp(x - log_total) - tl.where(at == target, 1.0, 0.0)) * slope
            tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty), mask=at < vocab)


def softmax_minus_target(
    logits_CV: Tensor, targets_C: Tensor, scale: float, softcap: float | None, *, wants_grad: bool
) -> Tensor:
    """Cross-entropies of logits; puts the logits' gradient in their place, in their dtype.

    Args:
        logits_CV: Contiguous, before scale and cap; overwritten where ``wants_grad``.
        targets_C: int64.
        scale: Factor of the logits.
        softcap: Logits become ``softcap * tanh(logits / softcap)``, after the scale.
        wants_grad: Whether the gradient is wanted.

    Returns:
        (C,) fp32.
    """
    rows, vocab = logits_CV.shape
    targets_C, loss_C = targets_C.contiguous(), logits_CV.new_empty(rows, dtype=torch.float32)
    block = min(SOFTMAX_BLOCK, _power(vocab))
    with _on(logits_CV):
        _softmax_kernel[(rows,)](
            logits_CV, targets_C, loss_C, vocab, scale, softcap or 1.0, softcap is not None, wants_grad, block,
            num_warps=16,
        )  # fmt: skip
    return loss_C


def works(device: str = "cuda") -> bool:
    """Whether each kernel, in the form that most models use, runs on a device and computes what torch does.

    Compiling them takes seconds, the first time on a machine.
    """
    # Whoever asks first may be inside no_grad or autocast.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        return _works(device)


def _works(device: str) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    x, grad, gain = random(5, 4096), random(5, 4096), random(4096) * 0.1 + 1
    out, rstd = EAGER.norm(x, gain, 1e-6, False)
    back, gate = (grad, x, rstd, gain, False, True, False), (x, grad, "silu")
    back_gate = (grad, x, out, "silu", True, True)
    pairs: list[tuple[Any, Any]] = [
        (FUSED.norm(x, gain, 1e-6, False), (out, rstd)),
        (FUSED.norm_again(x, rstd, gain, False), out),
        (FUSED.norm_backward(*back)[0], EAGER.norm_backward(*back)[0]),
        (FUSED.gate(*gate), EAGER.gate(*gate)),  # type: ignore[arg-type]
        (FUSED.gate_backward(*back_gate), EAGER.gate_backward(*back_gate)),  # type: ignore[arg-type]
    ]
    heads, cos, sin = random(2, 5, 3, 128).transpose(1, 2), random(1, 5, 128), random(1, 5, 128)
    pairs += [(FUSED.rotate(heads, cos, sin, back), EAGER.rotate(heads, cos, sin, back)) for back in (False, True)]
    targets = torch.tensor([0, 4095, 3, 7, 50], device=device)
    given = x.float().requires_grad_()
    loss = torch.nn.functional.cross_entropy(given, targets, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), given)
    low = x.clone()
    pairs += [((softmax_minus_target(low, targets, 1.0, None, wants_grad=True), low), (loss, expected.to(low.dtype)))]
    return all(_close(mine, eager) for mine, eager in pairs)


def _close(mine: Any, eager: Any) -> bool:
    """Whether results differ by rounding alone."""
    if isinstance(mine, tuple):
        return all(map(_close, mine, eager))
    bound = max(2 * torch.finfo(mine.dtype).eps, 1e-5)
    apart, size = (mine.float() - eager.float()).norm(), eager.float().norm()
    return mine.dtype == eager.dtype and bool(apart <= bound * size)


# --- launching ---------------------------------------------------------------------------------------------


def _there(x: Tensor) -> bool:
    return x.is_cuda and x.numel() > 0 and x.dtype != torch.float64


def _fits(x_ND: Tensor) -> bool:
    return _there(x_ND) and x_ND.shape[-1] <= WIDEST


def _on(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's; to ask and to set it takes a while."""
    return torch.cuda.device(x.device) if _devices() > 1 else _HERE


_HERE = contextlib.nullcontext()


@functools.cache
def _devices() -> int:
    return torch.cuda.device_count()


def _power(width: int) -> int:
    return int(triton.next_power_of_2(width))


def _warps(width: int) -> int:
    """Of 32 threads, about 16 elements each."""
    return min(16, max(1, _power(width) // 512))


def _processors(x: Tensor) -> int:
    return _processors_of(x.device)


@functools.cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
