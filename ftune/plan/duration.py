"""How long a run takes, before it begins: its arithmetic over the device's measured speed in matmuls.

Floating-point operations of a token are counted from the model's shape: two for each weight of a projection that it
passes, and attention's products with the tokens before it. A backward pass costs the same again for the gradient of
the inputs, and once more for the gradient of what trains (Kaplan et al., arXiv:2001.08361, sec. 2.1). The head counts
for tokens in the loss alone. What else a step does is a share of the matmuls' time, found by measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftune.methods import Method, ModelShape
    from ftune.plan.plan import Plan

__all__ = ["EFFICIENCY", "duration_of", "forward_flops", "update_flops"]

EFFICIENCY = {"cpu": 0.6, "cuda": 0.6}
"""What steps reach of the speed of matmuls alone. CPU: 0.57 to 0.76 of it, with LoRA on a 135M model on one core with
AVX-512, in bfloat16 and float32, by the time of the process. CUDA: about 0.7, with LoRA on an 8B model on an H100
(docs/benchmarks.md); a small model reaches less, for the GPU waits for Python."""
QUANTIZED = 0.9
"""Of that again, where a base in 4 bits is dequantized for every product."""


def forward_flops(shape: ModelShape, tokens: float, target_tokens: float, row_length: float) -> float:
    """Floating-point operations of a forward pass.

    Args:
        shape: The base model.
        tokens: Tokens that pass the blocks.
        target_tokens: Tokens in the loss, which alone pass the head.
        row_length: Tokens in a document, of which a token attends to half on average.
    """
    projections = 2 * sum(linear.elements for linear in shape.linears)
    attention = 2 * 2 * shape.layers * shape.heads * shape.head_dim * row_length / 2
    return tokens * (projections + attention) + target_tokens * 2 * shape.hidden * shape.vocab


def update_flops(
    shape: ModelShape, method: Method, tokens: float, target_tokens: float, row_length: float, recomputed: float
) -> float:
    """Floating-point operations of training on so many tokens.

    recomputed: Share of the blocks that run a second time in the backward pass; the rest as of ``forward_flops``.
    """
    forward = forward_flops(shape, tokens, target_tokens, row_length)
    trained = min(1.0, method.trainable_parameters(shape) / max(1, shape.parameters))
    blocks = forward_flops(shape, tokens, 0, row_length)
    return forward * (2 + trained) + blocks * recomputed


def duration_of(plan: Plan) -> dict[str, Any] | None:
    """Seconds of updates and of evaluations; None where the device's speed is not known.

    GPUs of several processes share the work, and what they tell each other is not counted; processes on CPUs are taken
    to share one machine.

    Returns:
        ``seconds`` in all, ``training``, ``evaluation``, ``evaluations``: how often the held-out loss is measured,
        ``flops`` and ``flops_per_second``: of matmuls alone, and ``measured``: whether on this device, or on paper.
    """
    machine, kind = plan.machine, plan.machine.device.type
    matmuls = machine.flops.get(str(plan.context.dtype).removeprefix("torch."), 0.0)
    if kind not in EFFICIENCY or not matmuls:
        return None
    train, held_out, recipe = plan.splits.train, plan.splits.eval, plan.recipe
    epochs = plan.total_steps / plan.steps_per_epoch
    tokens, targets = train.stats.tokens, train.stats.target_tokens
    training = epochs * update_flops(
        plan.shape,
        recipe.method,
        tokens,
        targets,
        tokens / max(1, len(train.examples)),
        plan.recomputed.blocks / max(1, plan.recomputed.of),
    )
    evaluation, times = 0.0, 0
    if held_out is not None and plan.eval_rows:
        every, count = recipe.evaluation.every_steps, held_out.stats.tokens
        times = 2 + (0 if every is None else (plan.total_steps - 1) // every)
        each = count / max(1, len(held_out.examples))
        evaluation = times * forward_flops(plan.shape, count, held_out.stats.target_tokens, each)
    speed = matmuls * EFFICIENCY[kind] * (QUANTIZED if recipe.method.base_quantization else 1.0)
    speed *= plan.world_size if kind == "cuda" else 1
    return {
        "seconds": (training + evaluation) / speed,
        "training": training / speed,
        "evaluation": evaluation / speed,
        "evaluations": times,
        "flops": training + evaluation,
        "flops_per_second": matmuls,
        "measured": machine.measured,
    }
