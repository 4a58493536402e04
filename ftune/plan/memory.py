"""How much memory a run will need, from shapes alone, item by item.

The activations are counted as autograd keeps them for a pre-norm decoder in transformers under autocast.
Let the residual stream have width ``d``, the feed-forward ``f``, and attention ``h`` query heads and ``k``
key-value heads of width ``e``; let ``b`` be the bytes of the compute dtype. A block whose weights are frozen
keeps for each token

- of an RMS norm, its input in fp32: ``4 d`` (transformers computes the norm through an fp32 copy); of a layer
  norm, its input as it is;
- of attention by ``scaled_dot_product_attention``, query, key, value, output and the logarithm of the sum of
  exponentials: ``b (2 h e + 2 k e) + 4 h``. With a mask the keys and values are repeated for every query head
  (``k = h``), and every layer keeps a copy of the mask in the compute dtype, ``b L^2`` for each row;
- of a gated feed-forward, gate, activated gate and up projection: ``3 b f``; without a gate, the input of the
  activation;
- nothing of its linear layers: a frozen weight needs no gradient, so the input is not kept. What adapters
  keep above that is each method's own ``saved_bytes_per_token``.

Where the weights themselves train, every linear layer keeps its input too, and every norm its normalized
input. The logits are counted at the positions in the loss only. The C library's allocator adds its own on the
CPU. ``scripts/measure_memory.py`` prints measured peaks beside these predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftune.methods import Method, ModelShape

__all__ = ["ITEMS", "MemoryEstimate", "estimate"]

ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "buffers", "runtime")
"""What a peak is made of, in the order in which it is shown."""

LOSS_BYTES = 12
"""Bytes a logit takes at the start of the backward pass: log-softmax, its gradient, the logits' gradient."""

RUNTIME_BYTES = {"cpu": 560 * 2**20, "cuda": 600 * 2**20}
"""CPU: Python with torch, transformers, peft, datasets and accelerate imported, after a first update
(measured on Linux). CUDA: the context and the workspaces of cuBLAS (an allowance, not measured)."""

HEAP_SHARE_OF_BASE = 0.2
HEAP_SHARE_OF_METHOD = 0.9
HEAP_SHARE_OF_COPIES = 0.5
"""Holes that glibc's heap keeps on the CPU, as shares of what is allocated between them: the base model's
activations, those of the method (which makes and frees about as much again), autocast's copies of weights.
Fitted to SmolLM2-135M; with every block mapped on its own (MALLOC_MMAP_THRESHOLD_) the holes vanish."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes as they lie in memory at the moment of the peak; ``total`` is their sum.

    The peak is the largest of four moments: the end of the forward pass, the loss, the recomputation of a
    block (with gradient checkpointing) and the optimizer's update. So ``logits`` is 0 where a recomputed
    block needs more.

    Attributes:
        weights: The base model.
        adapters: Trained parameters that are no base weights.
        gradients: fp32 gradients of what trains.
        optimizer: Optimizer state.
        activations: What autograd keeps for the backward pass.
        logits: The loss over the vocabulary.
        buffers: Masks, autocast's copies of trained weights, dequantized weights, temporaries of the update,
            holes in the heap.
        runtime: Imported libraries on the CPU, the context on CUDA.
        total: The sum of all.
        arguments: What ``estimate`` was called with; no part of ``as_dict``.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    runtime: int
    total: int
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def as_dict(self) -> dict[str, int]:
        """The items and the total, in bytes."""
        return {name: getattr(self, name) for name in (*ITEMS, "total")}


def estimate(
    method: Method,
    shape: ModelShape,
    *,
    optimizer: str,
    dtype_bytes: int,
    rows: int,
    length: int,
    target_tokens: int,
    recomputed_blocks: int,
    attention: str,
    device_type: str,
    packed: bool,
) -> MemoryEstimate:
    """Estimate the peak memory of training, on one device.

    Args:
        method: The method, with its settings.
        shape: The base model.
        optimizer: Its name in the recipe.
        dtype_bytes: Bytes of an element in the dtype the model computes in.
        rows: Sequences in a micro-batch.
        length: Tokens in a row.
        target_tokens: Tokens in the loss, in a micro-batch.
        recomputed_blocks: How many of the first blocks are recomputed in the backward pass.
        attention: ``sdpa``, ``eager`` or ``flash_attention_2``.
        device_type: ``cpu`` or ``cuda``.
        packed: Whether rows hold several documents, which takes a mask to keep apart.
    """
    arguments = dict(locals())
    length += method.virtual_positions
    tokens = rows * length
    layers, trained = shape.layers, method.trainable_parameters(shape)
    whole = method.artifact == "model"
    stored = _stored_bytes(method, dtype_bytes)
    # padding on the right of causal attention needs no mask
    masked = attention != "flash_attention_2" and (packed or _slides(shape, length))

    kept_by_base = tokens * _base_bytes_per_token(
        shape, whole, stored, dtype_bytes, attention, masked, device_type
    ) + rows * _attention_matrices(shape, length, dtype_bytes, attention, device_type)
    kept_by_method = tokens * method.saved_bytes_per_token(shape, dtype_bytes) + method.saved_bytes(shape, dtype_bytes)
    kept = kept_by_base + kept_by_method
    mask = rows * length**2 * dtype_bytes * masked
    kept_masks = layers * rows * method.mask_cells(length) * dtype_bytes * masked
    logits = target_tokens * shape.vocab
    # Autocast casts a trained fp32 weight once in a forward pass; the copy lives until its backward is done.
    cast = dtype_bytes if dtype_bytes < (stored if whole else 4) else 0
    head_copy = cast * shape.extra["head_elements"] if whole else 0
    copies = cast * sum(linear.elements for linear in shape.linears) + head_copy if whole else cast * trained
    scratch = _dequantized_bytes(method, shape, stored, dtype_bytes)

    # (activations, logits, buffers) at each moment that may be the peak
    moments: list[tuple[int, int, int]] = []
    if recomputed_blocks:
        inputs = tokens * recomputed_blocks * shape.hidden * stored
        one_block = kept // layers
        rest = one_block * (layers - recomputed_blocks)
        moments += [
            (rest + inputs, logits * dtype_bytes, copies + mask),
            (rest + inputs, logits * LOSS_BYTES, head_copy),
            # the gradients inside a block are about as large as its feed-forward's activations
            (
                inputs + one_block + 3 * tokens * shape.extra["ffn_width"] // layers * dtype_bytes,
                0,
                copies // layers + mask + scratch,
            ),
        ]
    else:
        moments.append((kept, logits * LOSS_BYTES, copies + kept_masks + scratch))
    moments.append((0, 0, method.update_bytes(shape, optimizer) if device_type == "cuda" else 0))

    activations, logit_bytes, buffers = max(moments, key=sum)
    if device_type == "cpu":
        # checkpointing frees activations but leaves the holes between what it keeps
        buffers += int(
            HEAP_SHARE_OF_BASE * kept_by_base
            + HEAP_SHARE_OF_METHOD * kept_by_method
            + HEAP_SHARE_OF_COPIES * copies * whole
        )
    items = {
        "weights": method.base_bytes(shape, stored),
        "adapters": method.adapter_bytes(shape),
        "gradients": method.gradient_bytes(shape),
        "optimizer": method.optimizer_bytes(shape, optimizer),
        "activations": activations,
        "logits": logit_bytes,
        "buffers": buffers,
        "runtime": RUNTIME_BYTES[device_type],
    }
    return MemoryEstimate(**items, total=sum(items.values()), arguments=arguments)


def _stored_bytes(method: Method, dtype_bytes: int) -> int:
    """Bytes of a base weight that is not quantized, as the method keeps it."""
    import torch

    return method.base_dtype(torch.float32 if dtype_bytes == 4 else torch.bfloat16).itemsize


def _slides(shape: ModelShape, length: int) -> bool:
    """Whether some layer's attention window is shorter than the row, so that a mask is needed."""
    window = shape.extra.get("sliding_window")
    return window is not None and length > window


def _base_bytes_per_token(
    shape: ModelShape, whole: bool, stored: int, compute: int, attention: str, masked: bool, device_type: str
) -> int:
    """Bytes that all blocks keep for one token, without what adapters keep and without anything quadratic.

    whole: the base weights train; stored, compute: bytes of a weight and of a computed element.
    """
    extra = shape.extra
    if extra["rms"]:
        norms = extra["norm_width"] * (4 + (stored if whole else 0))
    else:
        # autocast computes layer norms in fp32 on CUDA
        norms = extra["norm_width"] * (4 if device_type == "cuda" else stored)
    query = shape.heads * shape.head_dim
    key = query if masked and attention == "sdpa" else shape.kv_heads * shape.head_dim
    attended = shape.layers * (compute * (2 * query + 2 * key) + 4 * shape.heads)
    feed_forward = extra["ffn_saved"] * extra["ffn_width"] * compute
    inputs = 0
    if whole and compute < stored:
        # autocast casts the input for each linear layer anew; the output projection's is attention's output
        inputs = compute * (sum(linear.in_features for linear in shape.linears) - shape.layers * query)
    elif whole:
        # norms' outputs (shared by the projections that read them) and the feed-forward's product
        inputs = compute * (2 * shape.layers * shape.hidden + extra["ffn_width"])
    return int(norms + attended + feed_forward + inputs)


def _attention_matrices(shape: ModelShape, length: int, compute: int, attention: str, device_type: str) -> int:
    """Bytes of attention probabilities that all layers keep for one row, where the kernel makes them."""
    cells = shape.layers * shape.heads * length**2
    if attention == "eager":
        # the softmax in fp32, its copy in the compute dtype, and the tanh of capped scores
        copy = compute if compute < 4 else 0
        return int(cells * (4 + copy + compute * bool(shape.extra.get("softcap"))))
    if attention == "sdpa" and device_type == "cpu" and shape.extra.get("attention_dropout"):
        # with dropout the CPU has no fused kernel: probabilities, dropped ones and the mask, all fp32
        return cells * 12
    return 0


def _dequantized_bytes(method: Method, shape: ModelShape, stored: int, compute: int) -> int:
    """Bytes of the largest dequantized weight, where the method keeps 4-bit ones."""
    if method.base_bytes(shape, stored) >= shape.parameters * stored:
        return 0
    return compute * max(linear.elements for linear in shape.linears)
