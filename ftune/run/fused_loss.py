"""Liger's fused head and cross-entropy, on CUDA, where a trial on the run's own head finds it the same and faster.

Its kernel makes a chunk's softmax and gradient in one pass over the logits, where ``linear_cross_entropy`` takes
several. Which is faster depends on the vocabulary, the width, the dtype and the GPU, so both are run. Only the forward
function is Liger's: the backward pass is one factor, which stays in fp32 whatever Liger's kernels make of it.

Source: Hsu et al., Liger Kernel (arXiv:2410.10989), sec. 3.2; liger-kernel 0.6.2 is the first to sum in fp32.

Shape suffixes: N positions, D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ftune.ops.cross_entropy import linear_cross_entropy
from ftune.run.head import AfterHead

__all__ = ["CHUNKED", "LIGER", "fused_cross_entropy", "fused_pays", "liger_is_there"]

CHUNKED, LIGER = "chunked", "liger"
"""How ``run.json`` names ``linear_cross_entropy`` and ``fused_cross_entropy``."""

POSITIONS = 4096
"""Most positions of a trial: enough that products take the time, and a few milliseconds of it."""
MARGIN = 1.05
"""How many times faster Liger's must be: below that the next trial might say otherwise."""
MEMORY = 1.1
"""How much of the memory of our own it may take, which is what the plan counts with."""
SCALED = 2**-11
"""Share by which the length of a gradient may differ: rounding of its elements cancels out in it, a factor that was
rounded to bfloat16 (up to 2^-9) does not."""
TURNS, BUDGET_SECONDS = 7, 0.5


def liger_is_there() -> bool:
    """Whether the package is installed, and can be imported."""
    try:
        _forward()
    except Exception:  # of its own, of triton's
        return False
    return True


def _forward() -> Callable[..., tuple[Any, ...]]:
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    return cast(Callable[..., tuple[Any, ...]], fused_linear_cross_entropy_forward)


def fused_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    bias_V: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """``linear_cross_entropy`` by Liger's kernel: the same arguments, and as exact.

    Returns:
        fp32, shape (). Differentiable once with respect to hidden states, weight and bias.
    """
    if not len(targets_N):
        return linear_cross_entropy(hidden_ND, weight_VD, targets_N, bias_V)
    if scale != 1.0:
        hidden_ND, bias_V = hidden_ND * scale, None if bias_V is None else bias_V * scale
    if not torch.is_grad_enabled():
        return _liger(hidden_ND, weight_VD, bias_V, targets_N, softcap, (False, False, False))[0]
    loss: Tensor = _FusedCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, softcap)  # type: ignore[no-untyped-call]
    return loss


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, softcap: float | None
    ) -> Tensor:
        loss, *grads = _liger(hidden_ND, weight_VD, bias_V, targets_N, softcap, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if given is None else given.dtype for given in (hidden_ND, weight_VD, bias_V)]
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        # In fp32, for the reason that ``linear_cross_entropy`` gives.
        return *(None if made is None else (made.float() * grad).to(dtype) for made, dtype in pairs), None, None


def _liger(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    softcap: float | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The loss, and the gradients that are wanted of hidden states, weight and bias; None for the others."""
    dtype = hidden_ND.dtype

    def given(tensor: Tensor, wanted: bool) -> Tensor:
        # A gradient comes back in the dtype of what it belongs to: an fp32 one is not to be rounded to 16 bits.
        kept = tensor if wanted and tensor.dtype == torch.float32 else tensor.to(dtype)
        return kept.detach().requires_grad_(wanted)

    # What is given in fp32 is multiplied in the dtype of the hidden states all the same.
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, dtype=dtype, enabled=dtype != torch.float32):
        loss, *_, grad_hidden, grad_weight, grad_bias = _forward()(
            given(hidden_ND, any(wants)),  # Liger makes no gradient at all where the hidden states want none
            given(weight_VD, wants[1]),
            targets_N,
            bias=None if bias_V is None else given(bias_V, wants[2]),
            reduction="sum",
            softcap=softcap,
            accum_dtype=torch.float32,
        )
    return loss, grad_hidden if wants[0] else None, grad_weight if wants[1] else None, grad_bias if wants[2] else None


def fused_pays(head: nn.Linear, after_head: AfterHead, dtype: torch.dtype, positions: int) -> bool:
    """Try both losses on a head, forward and backward, with hidden states and targets made up.

    Args:
        head: The output head, on CUDA; its parameters train or do not as in the run.
        after_head: What becomes of its logits.
        dtype: What the model computes in.
        positions: Targets in a micro-batch.

    Returns:
        Whether Liger's gives the same loss and gradients, up to rounding, in less time and not in more memory.
        False where it fails, for whatever reason.
    """
    # Liger has no scale, and only a power of two can be put onto 16-bit hidden states without rounding them. Nor does
    # it make the gradient of a bias in fp32 but for logits in fp32.
    trains_bias = head.bias is not None and head.bias.requires_grad
    if dtype != torch.float32 and (trains_bias or math.frexp(after_head.scale)[0] != 0.5):
        return False
    try:
        example = _example(head, after_head, dtype, min(max(1, positions), POSITIONS))
        runs = [partial(_gradients, loss, after_head, example) for loss in (linear_cross_entropy, fused_cross_entropy)]
        # The comparison is the warm-up too: kernels are compiled and workspaces made.
        if not _agree(runs[0](), runs[1](), dtype):
            return False
        (own_seconds, own_bytes), (seconds, peak_bytes) = _costs(runs)
        return own_seconds >= MARGIN * seconds and peak_bytes <= MEMORY * own_bytes
    except Exception:  # of import, of compilation, of memory: a run that works without is not to fail for it
        return False
    finally:
        torch.cuda.empty_cache()  # blocks of the trial's sizes are not to be holes in the run's memory


def _example(head: nn.Linear, after_head: AfterHead, dtype: torch.dtype, positions: int) -> tuple[Any, ...]:
    """Hidden states, weight, targets and bias: logits spread by 3, and targets from unlikely to nearly certain."""
    weight_VD = head.weight.detach()
    generator = torch.Generator(weight_VD.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": weight_VD.device}
    targets_N = torch.randint(len(weight_VD), (positions,), **options)
    noise_ND = torch.randn(positions, weight_VD.shape[1], **options)
    rows_ND = weight_VD[targets_N].float()
    squares_N1 = rows_ND.square().sum(-1, keepdim=True)
    mean = squares_N1.mean()
    lift_N1 = torch.linspace(0, 25, positions, device=weight_VD.device)[:, None]
    # A row of zeros, as they pad a vocabulary, lifts no logit.
    hidden_ND = 3 / mean.sqrt() * noise_ND + lift_N1 * rows_ND / squares_N1.maximum(mean)
    hidden_ND = (hidden_ND / after_head.scale).to(dtype).requires_grad_()
    weight_VD.requires_grad_(head.weight.requires_grad)
    bias_V = None if head.bias is None else head.bias.detach().requires_grad_(head.bias.requires_grad)
    return hidden_ND, weight_VD, targets_N, bias_V


def _gradients(loss: Callable[..., Tensor], after_head: AfterHead, example: tuple[Any, ...]) -> list[Tensor]:
    """The loss, and the gradients of whatever wants one."""
    total = loss(*example, scale=after_head.scale, softcap=after_head.softcap)
    wanted = [given for given in example if given is not None and given.requires_grad]
    # A third: rounded to bfloat16 it is off by 2^-9.
    return [total.detach(), *torch.autograd.grad(total / 3, wanted)]


def _agree(mine: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether each pair is the same up to rounding: element by element, and more closely in length."""
    bound = max(torch.finfo(dtype).eps, 2**-14)
    for one, other in zip(mine, theirs, strict=True):
        size, length, apart = (
            float(torch.linalg.vector_norm(given, dtype=torch.float32)) for given in (one, other, other - one)
        )
        if not (apart <= bound * size and abs(length - size) <= SCALED * size):
            return False
    return True


def _costs(runs: Sequence[Callable[[], object]]) -> list[tuple[float, int]]:
    """Median seconds and most bytes that each takes, in turns: a GPU that slows down slows both."""
    taken: list[list[tuple[float, int]]] = [[] for _ in runs]
    began = time.perf_counter()
    for _ in range(TURNS):
        for run, costs in zip(runs, taken, strict=True):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held, before = torch.cuda.memory_allocated(), time.perf_counter()
            run()
            torch.cuda.synchronize()
            costs.append((time.perf_counter() - before, torch.cuda.max_memory_allocated() - held))
        if time.perf_counter() - began > BUDGET_SECONDS:
            break
    return [(statistics.median(s for s, _ in costs), max(b for _, b in costs)) for costs in taken]
